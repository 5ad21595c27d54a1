"""From a table, a job file or a Python program to checked rows; nothing here loads torch.

options    every option of a job, declared once; `sift` has those of the sifting
job        a job file and the command's options, made into one `Job`
gate       text from outside: UTF-8, JSON; `plain_yaml` reads YAML, `cells` a spreadsheet's fields
formats    CSV, JSON, JSON lines and Parquet, made into records
given      prompts, dicts and data frames of a Python program
table      records, made into rows; `check` looks at each, `near_miss` at names of columns, `newbie` at prompts
naming     names of pictures and folders, safe on every system
pictures   pictures and LoRAs that rows name, below one folder
row        one picture to make; `task` ties it to what an engine is asked for
"""
