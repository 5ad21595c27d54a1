# %% [markdown]
# # A LoRA on an optimized pipe
#
# The LoRA made here is random: put any LoRA for the model in its place. It needs `pip install peft`.

# %%
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import ernie_accel

pipe = ernie_accel.load("baidu/ERNIE-Image-Turbo", preset="auto", prompt_enhancer=False)
layers = ["to_q", "to_k", "to_v", "to_out.0"]
pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=layers, init_lora_weights=False), adapter_name="random")
pipe.save_lora_weights("loras", get_peft_model_state_dict(pipe.transformer, adapter_name="random"))
pipe.unload_lora_weights()

# %%
pipe("a lighthouse at dusk").images[0]

# %%
pipe.load_lora_weights("loras", adapter_name="style")
pipe.set_adapters("style", 0.8)
pipe("a lighthouse at dusk").images[0]

# %%
pipe.unload_lora_weights()
ernie_accel.report(pipe)
