"""The process that draws: models opened once, several requests at work, one device.

__main__.py   the process, at its end of a socket
worker.py     what it hears and answers
together.py   several drawings' calls of a network, made as one
models.py     models opened, with their networks shared and all work on one thread
loras.py      LoRAs that clients sent, open while requests need them
job.py        one request drawn, with progress, looks and cancelling
discreet.py   errors without the places of files
costs.py      what a request will take: seconds, memory, FLOPs
"""
