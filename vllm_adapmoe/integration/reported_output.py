"""Adds the worker's report to vLLM's output of a step, with whose tokens the scheduler receives it."""

from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_adapmoe.scheduling.report import WorkerReport

EMPTY = WorkerReport()
OUTPUT_FIELDS = [entry.name for entry in fields(ModelRunnerOutput)]


@dataclass
class ReportedOutput(ModelRunnerOutput):
    """`ModelRunnerOutput` with a worker's report."""

    report: WorkerReport = EMPTY

    @classmethod
    def of(cls, output: ModelRunnerOutput, report: WorkerReport) -> "ReportedOutput":
        """Returns the output with a report; vLLM shares some outputs, so `output` itself stays as it is."""
        return cls(**{name: getattr(output, name) for name in OUTPUT_FIELDS}, report=report)


class ReportedAsyncOutput(AsyncModelRunnerOutput):
    """An output in flight from the device, which becomes a `ReportedOutput` when it is awaited."""

    def __init__(self, output: AsyncModelRunnerOutput, report: WorkerReport) -> None:
        self.output = output
        self.report = report

    def get_output(self) -> ModelRunnerOutput:
        return ReportedOutput.of(self.output.get_output(), self.report)

    def get_kv_connector_output(self) -> Any:
        """Returns the part of the output that remains if `get_output` fails; vLLM calls this since 0.33."""
        output: Any = self.output
        return output.get_kv_connector_output()


def ends_step(output: Any) -> bool:
    """Returns whether a worker's output is that of a whole step, not None or what a later stage continues with."""
    return isinstance(output, ModelRunnerOutput | AsyncModelRunnerOutput)


def with_report(output: Any, report: WorkerReport) -> Any:
    """Returns the output of a step with the worker's report."""
    of = ReportedOutput.of if isinstance(output, ModelRunnerOutput) else ReportedAsyncOutput
    return of(output, report)


def report_of(output: Any) -> WorkerReport:
    """Returns the report of an output; an empty one if a worker without cached experts has made it."""
    return output.report if isinstance(output, ReportedOutput) else EMPTY
