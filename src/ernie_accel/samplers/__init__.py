"""Samplers for flow matching: solvers.py has their arithmetic, stepping.py puts one into a diffusers scheduler."""
