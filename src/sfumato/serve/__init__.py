"""The HTTP API: one asyncio front, a worker process for each device, and a ledger that neither can lose.

    settings.py   what a server is started with, checked
    money.py      prices in a file, and what a job costs in integer millionths
    keys.py       who may come in: keys, kept as hashes
    ledger.py     jobs and what is owed for them, in SQLite or PostgreSQL; tables.py: their columns
    store.py      uploads and pictures on disk, by names nobody can guess
    rates.py      how often somebody may ask
    wire.py       messages between front and worker: JSON and raw bytes
    worker/       the process that draws
    devices.py    workers asked, watched and started again; process.py: one as a process of this machine
    desk.py       jobs accepted, handed to devices, settled; job.py: one of them in memory
    web/          the routes, and what stands before them
    run.py        all of it put together, from start to drained

Only `worker/` imports torch. Needs the extra `sfumato[serve]`.
"""
