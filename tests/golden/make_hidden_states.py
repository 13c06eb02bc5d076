"""Write hidden-states.npz: what transformers computes before lm_head, for the models in tiny-*.npz.

Needs ``pip install torch transformers``; the tests read the file and need neither.
Run as ``python tests/golden/make_hidden_states.py`` after make_tiny_models.py.

"NAME" [n, hidden] are the hidden states after the final norm of the ids in tiny-NAME.npz, float32;
"versions" names what computed them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModel

HERE = Path(__file__).parent


def hidden_states(golden: Path) -> np.ndarray:
    """Of the ids in one golden file."""
    with np.load(golden) as arrays, tempfile.TemporaryDirectory() as folder:
        for name in arrays.files:
            if "." in name:
                Path(folder, name).write_bytes(arrays[name].tobytes())
        model = AutoModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        ids = torch.from_numpy(arrays["ids"].astype(np.int64))[None]
        with torch.inference_mode():
            return model(ids).last_hidden_state[0].numpy()


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    states = {
        path.stem.removeprefix("tiny-"): hidden_states(path)
        for path in sorted(HERE.glob("tiny-*.npz"))
    }
    versions = np.array([f"{m.__name__} {m.__version__}" for m in (torch, transformers)])
    path = HERE / "hidden-states.npz"
    np.savez_compressed(path, **states, versions=versions)
    shapes = ", ".join(f"{name} {array.shape}" for name, array in states.items())
    print(f"{path.name}: {path.stat().st_size} bytes, {shapes}")


if __name__ == "__main__":
    main()
