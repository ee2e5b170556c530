"""Get a model and check that it can be served: `python examples/model_download_helper.py Qwen/Qwen2.5-0.5B-Instruct`.

Downloads with a progress bar into the Hugging Face cache (`HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` are
honoured), or with `modelscope:` in front of the id from ModelScope. Then it reads the configuration, without weights.
"""

from __future__ import annotations

import argparse
import sys

from sagellm_core.models import list_local_models, read_model_config, resolve_model
from sagellm_protocol import SageLLMError


def main(model: str | None, revision: str | None) -> int:
    """Get and describe `model`, or list what is there; returns an exit status."""
    if model is None:
        for local in list_local_models():
            print(f"{local.name:50s} {local.num_bytes / 2**20:9.1f} MiB  {local.path}")
        return 0
    try:
        path = resolve_model(model, revision=revision)
        config = read_model_config(path)
    except SageLLMError as error:
        print(f"error [{error.code}]: {error.message}", file=sys.stderr)
        return 1
    spec = config.spec
    print(f"path:         {path}")
    print(f"architecture: {config.architecture}")
    print(f"size:         {spec.num_layers} layers of width {spec.hidden_size}, {spec.vocab_size} tokens")
    print(f"context:      {config.max_model_len} tokens")
    print(f"run it:       sage-llm run -m {model} -p 'Hello'")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Download a model, or list the models on this machine.")
    parser.add_argument("model", nargs="?", help="hub id, folder, .gguf file or `builtin`; leave out to list")
    parser.add_argument("--revision", help="branch, tag or commit")
    arguments = parser.parse_args()
    sys.exit(main(arguments.model, arguments.revision))
