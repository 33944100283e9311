"""The exceptions a user can meet, and the exit codes they lead to.

Every message is one line that names the value, the rule it breaks and the fix.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a run's exit status means. Launchers may rewrite it: `mpinfer verify` is the authority."""

    COMPLETE = 0
    RECORDS_FAILED = 1  # complete, but some records carry an error instead of an output
    BAD_INPUT = 2  # spec, model, input, output directory or launch
    FAULT = 3  # resumable
    INTERRUPTED = 4  # resumable


class MpinferError(Exception):
    """Base of all errors that are reported in one line, without a traceback."""

    exit_code = ExitCode.BAD_INPUT


class SpecError(MpinferError):
    """The job file, an override or a command-line value breaks a rule."""


class LaunchError(MpinferError):
    """The world that MPI built is not the one that the launcher promised, or no launcher was found."""


class PlanError(MpinferError):
    """No layout, or not the one asked for, fits the model and the ranks."""


class ModelError(MpinferError):
    """The model directory is incomplete, damaged, or of a kind that cannot be run."""


class InputError(MpinferError):
    """The input file as a whole cannot be used."""


class OutputError(MpinferError):
    """The output directory cannot be used for this job."""


class TransportError(MpinferError):
    """A message between ranks is not the one that was due. Ends the world, as any fault does."""

    exit_code = ExitCode.FAULT


class OutOfMemoryError(MpinferError):
    """Memory does not suffice for a batch that cannot be computed in halves. Ends the world, as any fault does."""

    exit_code = ExitCode.FAULT


class WorldLostError(TransportError):
    """Ranks have died that the others cannot do without."""


class RecordError(MpinferError):
    """One record cannot be computed. It becomes that record's result; the run goes on."""
