"""Identifies models in the ways that vLLM may be told to get them; prints the hashes, or what was refused.

python run_identities.py CASES: a list of [NAME, ENVIRONMENT, {model, revision, ..., load: {...}}], JSON.
"""

import json
import os
import sys
from typing import Any

from vllm.config import LoadConfig

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration.loading.identity import Folder, model_hash, source_files


def identify(load: dict[str, Any], download: bool = True, **model: Any) -> dict[str, str]:
    try:
        sources = source_files(Folder(**model), LoadConfig(**load), download)
        return {"hash": model_hash(Folder(**model), LoadConfig(**load)), "origin": sources.origin}
    except AdapMoEError as error:
        return {"refused": str(error)}


def main() -> None:
    answers = {}
    for name, environment, model in json.loads(sys.argv[1]):
        os.environ.update(environment)
        answers[name] = identify(**model)
        for variable in environment:
            del os.environ[variable]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
