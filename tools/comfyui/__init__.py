"""The example workflows of the ComfyUI nodes, and running them through ComfyUI itself.

workflows     the graphs, and the files that ComfyUI's page loads
run           run all of them, headless, with the embedded model: ``python -m tools.comfyui.run PATH``
"""
