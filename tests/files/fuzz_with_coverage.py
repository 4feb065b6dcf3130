"""Fuzzes a reader for a while, guided by coverage: `python tests/files/fuzz_with_coverage.py trace 600 FOLDER`.

Wants atheris, which no test needs. Half of the runs damage sound files as `test_fuzz.py` does, with the fuzzer's bytes
for its choices; in the other half the fuzzer's bytes are the file, beginning with a sound one. Files that are not read
in a line or in bounds are kept in FOLDER; those worth keeping go to `tests/data/fuzz`.
"""

import hashlib
import random
import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "files")]
with atheris.instrument_imports(include=["vllm_adapmoe"]):
    import test_fuzz


def main() -> None:
    kind, seconds, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / f"corpus-{kind}"
    corpus.mkdir(exist_ok=True)
    (corpus / "sound").write_bytes(b"\1" + test_fuzz.sound(kind))
    for number in range(8):  # as many choices as a test makes
        (corpus / f"choices-{number}").write_bytes(b"\0" + random.Random(number).randbytes(2000))
    read, seen = test_fuzz.read, set()

    def kept(kind: str, content: bytes) -> str:
        try:
            return read(kind, content)
        except Exception as error:
            where = error.__traceback__
            while where.tb_next is not None:
                where = where.tb_next
            place = (type(error), where.tb_frame.f_code.co_filename, where.tb_lineno)
            if place not in seen:  # the same again is of no use
                seen.add(place)
                (folder / f"{kind}-{hashlib.blake2s(content, digest_size=4).hexdigest()}").write_bytes(content)
                print(f"found: {place}: {str(error)[:300]}", flush=True)
            return ""

    test_fuzz.read = kept
    damage = test_fuzz.fuzz(kind).hypothesis.fuzz_one_input

    def one(data: bytes) -> None:
        if data[:1] == b"\1":
            kept(kind, data[1:])
        else:
            damage(data[1:])

    limits = [f"-max_total_time={seconds}", "-max_len=60000", "-len_control=0", "-rss_limit_mb=4096", "-timeout=60"]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
