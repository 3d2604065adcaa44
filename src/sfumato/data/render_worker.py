"""A process that renders chunks of a scene store: `python -m sfumato.data.render_worker`.

It speaks JSON lines: the first on its input describes the source, each further one is the number of a
chunk, answered by the same number once the chunk's bytes are on the disk, or by an object with `error`. It
ends when its input ends, so it never outlives the process that started it.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    import torch

    from sfumato.data.scenes import SceneSource
    from sfumato.errors import SfumatoError

    torch.set_num_threads(1)
    source = SceneSource(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        chunk = json.loads(line)
        try:
            source.render_chunk(chunk)
            answer = chunk
        except SfumatoError as error:
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
