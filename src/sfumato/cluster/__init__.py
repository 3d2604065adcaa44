"""Work on many machines, by Ray (`pip install 'sfumato[cluster]'`).

connection.py  a cluster joined, or started on this machine
bulk.py        files of prompts drawn, and folders encoded, with Ray Data
replicas.py    workers of `sfumato serve` as replicas of Ray Serve
"""
