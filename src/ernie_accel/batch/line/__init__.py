"""Move rows from the table to finished pictures. START HERE, in `line`: it is where the parts come together.

line          the production line: schedule, engine, writer, ledger
schedule      which rows make a batch, and how large it is
slot          a thread that renders, beside the one that answers
assembly      puts a line together
produce       runs a line until it is empty; `producer` keeps one for as long as a service lives
compile_rule  whether compiling pays for a short job
"""
