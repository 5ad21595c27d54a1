"""Keep what a job makes: no file is half-written, lost, or replaced if it is not the job's own.

folder    the output folder, which nothing leaves; writes files in one step
ledger    the state of every row, in SQLite
writer    threads that encode and write pictures; `sieve` looks at them first
manifest  every row and what became of it, for programs and spreadsheets
report    what was made, for people; `page` is its HTML, `runs` remembers the machines
"""
