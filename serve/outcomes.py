"""What an executor is asked for and gives back: the seam between planning and computing."""

from typing import Any, NamedTuple, Protocol

from jaxsys.errors import RunError
from jaxsys.serve.iterations import Iteration
from jaxsys.serve.requests import Request


class TokenLogprobs(NamedTuple):
    """Log-probabilities beside one chosen token."""

    logprob: float
    top_tokens: list[int]
    top_logprobs: list[float]
    rank: int = 0
    """Place among all tokens by likelihood, from 1; 0 where it was not looked for."""


class Sampled(NamedTuple):
    """What one iteration sampled, in the order of `Iteration.sampling`."""

    tokens: list[int]
    """NOTHING (of `sampling`) for a request whose logits are not finite."""
    logprobs: list[TokenLogprobs | None] | None
    """None where no request of the iteration asked."""
    ended: list[bool] | None = None
    """Whose output ends with its token, or its last of `more`, by its grammar; None where no
    request has one."""
    more: list[list[int]] | None = None
    """Tokens behind each first one: guesses that were right, and one more; None where none was
    guessed."""
    more_logprobs: list[list[TokenLogprobs]] | None = None
    """Beside those, of requests that asked."""


class RequestFault(RunError):
    """One request cannot be computed; nothing has been touched on its behalf."""

    def __init__(self, request: Request, cause: Exception):
        super().__init__(f"the request cannot be computed: {cause}")
        self.request = request


class Executor(Protocol):
    """Something that runs iterations: on a device, or in virtual time."""

    def dispatch(self, iteration: Iteration) -> Any:
        """Queues an iteration; the handle is for `collect`.

        Raises:
            RequestFault: before anything is queued; once that request is ended, the same iteration
                may be dispatched again, and leaves it out.
        """
        ...

    def collect(self, handle: Any) -> Sampled:
        """Waits for a dispatched iteration."""
        ...

    def release(self) -> list[RequestFault]:
        """Queues what was held back until the tokens of the iteration before were known.

        To be called when they were taken in, before any request changes.

        Returns:
            The requests whose grammars cannot be followed further.
        """
        ...

    def rebuild(self) -> None:
        """After a fault of the device: begins anew with empty pages."""
        ...
