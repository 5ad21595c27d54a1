"""What the documentation counts: files of every known family, and of one of each architecture beside them."""

from __future__ import annotations

#: Parts of their paths. A file has 10 to 60 tests; all 223 files together would take a day on two cores.
FILES = (
    "/aura_flow/", "/chroma/test_pipeline_chroma.py", "/cogvideo/test_cogvideox.py", "/cogview4/test_cogview4.py",
    "/controlnet/test_controlnet.py", "/flux/test_pipeline_flux.py", "/flux/test_pipeline_flux_img2img.py",
    "/flux/test_pipeline_flux_inpaint.py", "/flux/test_pipeline_flux_fill.py", "/flux/test_pipeline_flux_kontext.py",
    "/flux2/test_pipeline_flux2_klein.py", "/hidream_image/", "/hunyuan_video/test_hunyuan_video.py",
    "/kandinsky5/test_kandinsky5.py", "/kandinsky5/test_kandinsky5_t2i.py", "/ltx/test_ltx.py",
    "/ltx/test_ltx_condition.py", "/lumina/", "/lumina2/", "/mochi/", "/pixart_sigma/", "/qwenimage/test_qwenimage.py",
    "/qwenimage/test_qwenimage_img2img.py", "/qwenimage/test_qwenimage_edit.py", "/sana/test_sana.py",
    "/stable_diffusion/test_stable_diffusion.py", "/stable_diffusion/test_stable_diffusion_img2img.py",
    "/stable_diffusion_3/test_pipeline_stable_diffusion_3.py", "/stable_diffusion_xl/test_stable_diffusion_xl.py",
    "/stable_diffusion_xl/test_stable_diffusion_xl_img2img.py", "/stable_video_diffusion/", "/wan/test_wan.py",
    "/wan/test_wan_22.py", "/wan/test_wan_22_image_to_video.py", "/z_image/",
)  # fmt: skip

#: Asked of part of the files, as each takes as long as `exact` takes on them.
SAMPLE_REQUESTS = ("SwapScheduler('unipc')", "TruncatePrompts(16)", "SetAttention('math')", "CacheSteps()")
SAMPLE = (
    "/flux/test_pipeline_flux.py", "/lumina2/", "/ltx/test_ltx_condition.py", "/qwenimage/test_qwenimage.py",
    "/stable_diffusion/test_stable_diffusion.py", "/wan/test_wan.py", "/wan/test_wan_22.py", "/z_image/",
)  # fmt: skip
