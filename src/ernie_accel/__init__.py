"""Make a diffusers pipeline fast, lean and trustworthy: ``pipe = ernie_accel.optimize(pipe, preset="turbo-fp8")``."""
