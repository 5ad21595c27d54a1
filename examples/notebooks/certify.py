# %% [markdown]
# # Certify
#
# The same prompts from the same noise, with and without quantizing. A notebook shows the figures, and the pictures of
# both.

# %%
import ernie_accel
from ernie_accel import Quantize, Thresholds

evaluation = ernie_accel.evaluate(
    ernie_accel.load("baidu/ERNIE-Image-Turbo"),
    Quantize("int8-weight-only"),
    ["a large red circle in the center on a white background", "a small blue square on the left on a grey background"],
    num_inference_steps=4,
    guidance_scale=1.0,
    thresholds=Thresholds(min_sqnr_db=20),
)
evaluation

# %%
assert evaluation.ok, evaluation.failures
evaluation.save("certificate")
