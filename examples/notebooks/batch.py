# %% [markdown]
# # A table of prompts
#
# Rows come from a file, CSV for instance (`read_table`), or from dicts or a data frame (`read_rows`).

# %%
from pathlib import Path

from PIL import Image

import ernie_accel
from ernie_accel.batch import produce, read_rows

products = [
    {"sku": "M-001", "colour": "red", "shape": "circle"},
    {"sku": "M-002", "colour": "blue", "shape": "ring"},
    {"sku": "M-003", "colour": "green", "shape": "square"},
]
rows = read_rows(
    products,
    template="a large {colour} {shape} in the center on a grey background",
    defaults={"width": 128, "height": 128},
)

# %%
pipe = ernie_accel.load("baidu/ERNIE-Image-Turbo", preset="auto")
results = list(produce(pipe, rows, "pictures", progress=False))

# %% [markdown]
# What became of each row:

# %%
for result in results:
    print(result.row.file_name, result.error or f"{result.seconds:.1f} s")

# %%
sheet = Image.new("RGB", (128 * len(results), 128))
for column, result in enumerate(results):
    with Image.open(result.path) as picture:
        sheet.paste(picture, (128 * column, 0))
sheet

# %% [markdown]
# Run the notebook again and finished pictures are kept. The folder's manifest lists every row and what became of it.

# %%
print((Path("pictures") / "manifest.jsonl").read_text(encoding="utf-8"))
