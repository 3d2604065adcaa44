"""The routes, and what stands before them.

app.py        all of it put together, and errors to JSON
guard.py      before every route: who asks, from where, how much, how long; and headers after it
body.py       bodies read strictly; pictures taken from them
answers.py    jobs waited for, server-sent events, JSON that can hold anything
schema.py     the request as JSON schema, made from the dataclass
jobs.py       what jobs of every kind have in common: submitted, watched, cancelled, fetched
thumbs.py     what was drawn, small
native.py     /v1/jobs, /v1/files, /v1/estimate, /v1/usage
videos.py     /v1/videos
openai.py     /v1/images/…, /v1/models
webui.py      /sdapi/v1/…
status.py     /healthz, /readyz, /metrics, and the page
"""
