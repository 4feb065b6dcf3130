"""Writes heldout/ and calibration/: excerpts of permissively licensed packages, one text a domain, and their sources.

python examples/tiny_mixtral/excerpts.py
"""

import re
from pathlib import Path

from corpus import DOMAINS, documents

LICENSES = {
    "torch": "BSD-3-Clause", "vllm": "Apache-2.0", "transformers": "Apache-2.0", "numpy": "BSD-3-Clause",
    "fastapi": "MIT", "pydantic": "MIT", "huggingface_hub": "Apache-2.0", "accelerate": "Apache-2.0", "rich": "MIT",
    "aiohttp": "Apache-2.0", "pandas": "BSD-3-Clause", "networkx": "BSD-3-Clause", "sympy": "BSD-3-Clause",
    "numba": "BSD-2-Clause", "opentelemetry": "Apache-2.0", "openai": "Apache-2.0", "matplotlib": "PSF-based",
    "tokenizers": "Apache-2.0", "starlette": "BSD-3-Clause", "uvicorn": "BSD-3-Clause", "pytest": "MIT",
    "jsonschema": "MIT", "xgrammar": "Apache-2.0", "mistral_common": "Apache-2.0", "pillow": "MIT-CMU",
}  # fmt: skip
CHARACTERS = 60_000
FILE_CHARACTERS = 8_000


STATED = re.compile(r"^(?:License|License-Expression|Classifier: License :: OSI Approved ::).*?(MIT|BSD|Apache)", re.M)


def license_of(name: str, text: str) -> str | None:
    """Licence of the package that a file belongs to: as its metadata states it, or by the first part of its path."""
    stated = STATED.search(text) if name.endswith("METADATA") else None
    if stated:
        return stated[1]
    package = name.split("/")[0].split("-")[0].lower()
    return next((text for known, text in LICENSES.items() if package.startswith(known)), None)


FOLDERS = {
    "heldout": (True, "Held-out excerpts, for evaluation. Never trained on, never calibrated on."),
    "calibration": (False, "Excerpts to calibrate on, from files on the training side of the split."),
}


def main() -> None:
    for name, (held_out, purpose) in FOLDERS.items():
        folder = Path(__file__).parent / name
        folder.mkdir(exist_ok=True)
        sources = ["# Sources", "", f"{purpose} Each file is cut at {FILE_CHARACTERS:,} characters.", ""]
        for domain in DOMAINS:
            parts: list[str] = []
            sources += [f"## {domain}.txt", ""]
            for path, text in documents(domain, held_out):
                text_license = license_of(path, text)
                if text_license is None or sum(map(len, parts)) >= CHARACTERS:
                    continue
                parts.append(text[:FILE_CHARACTERS])
                sources.append(f"- `{path}` ({text_license})")
            sources.append("")
            (folder / f"{domain}.txt").write_text("\n\n".join(parts))
        (folder / "SOURCES.md").write_text("\n".join(sources))


if __name__ == "__main__":
    main()
