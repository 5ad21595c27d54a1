"""From picture to picture: image to image, inpainting, and a second pass over what was drawn.

edit.py       START HERE: image_to_image, inpaint, refine
pictures.py   pictures and masks of any kind become tensors, or a clear error
late_start.py a schedule that begins in the middle, at a noised picture
pipelines.py  the same as classes in the manner of diffusers
"""
