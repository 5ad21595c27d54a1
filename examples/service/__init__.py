"""An image service in front of one pipe: OpenAI's images API, batched as requests come.

    python -m examples.service

settings   what the service is asked to be, by environment variables
schema     what a request may say: OpenAI's fields, and those of SGLang and vLLM-Omni
answers    what is answered: pictures, events, and errors in OpenAI's format
gate       what every request passes first: size, time, key; and what no answer may leak
studio     the `Producer` behind it all, and the files that come and go
app        START HERE: the routes
connection ends connections that clients hold for nothing
on_ray     the same app as replicas of Ray Serve
"""
