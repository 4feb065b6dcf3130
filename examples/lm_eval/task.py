"""Writes a local lm-evaluation-harness task: which of four continuations is the one that the text has?

    python examples/lm_eval/task.py examples/tiny_mixtral/heldout /tmp/lm_eval_task

The three wrong ones follow other passages of the same file, so that style alone does not identify the right one.
"""

import json
import random
import sys
from pathlib import Path

CONTEXT, CONTINUATION, CHOICES = 400, 80, 4
QUESTIONS = 100
"""For each file."""
TASK = """\
task: continuation
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def questions(text: str, generator: random.Random) -> list[dict]:
    made = []
    for _ in range(QUESTIONS):
        places = [generator.randrange(CONTEXT, len(text) - CONTINUATION) for _ in range(CHOICES)]
        choices = [text[place : place + CONTINUATION] for place in places]
        answer = generator.randrange(CHOICES)
        choices[0], choices[answer] = choices[answer], choices[0]
        made.append({"context": text[places[0] - CONTEXT : places[0]], "choices": choices, "answer": answer})
    return made


def main() -> None:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    rows = [row for path in sorted(source.glob("*.txt")) for row in questions(path.read_text(), generator)]
    file = folder / "continuation.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "continuation.yaml").write_text(TASK.format(file=file.resolve()))
    print(f"{len(rows)} questions in {folder}")


if __name__ == "__main__":
    main()
