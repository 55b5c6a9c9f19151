"""Requests that follow a grammar: which tokens it admits next, and when their output ends with it.

Whatever goes wrong is the fault of one request, and is put down to it.
"""

from collections.abc import Sequence

from jaxsys.errors import UsageError
from jaxsys.serve.grammars import Follower, Grammars
from jaxsys.serve.outcomes import RequestFault
from jaxsys.serve.requests import Request
from jaxsys.serve.sampling import NOTHING


class Following:
    """Where the outputs of an executor's requests stand in their grammars."""

    def __init__(self, grammars: Grammars | None):
        """
        Args:
            grammars: over the model's vocabulary; without, no request may have one.
        """
        self._grammars = grammars
        self.faults: list[RequestFault] = []

    def of(self, request: Request) -> Follower:
        """Where a request's output stands in its grammar, with all its tokens."""
        grammar = request.sampling.grammar
        assert grammar is not None
        if self._grammars is None:
            raise UsageError("this instance knows no vocabulary that a grammar could be about")
        if request.follower is None or request.follower.count > len(request.output_tokens):
            request.follower = self._grammars.begin(grammar)
        request.follower.follow(request.output_tokens)
        return request.follower

    def follow(self, requests: Sequence[Request | None], tokens: Sequence[int]) -> list[bool]:
        """Takes chosen tokens in where there is a grammar; whose output ends with its token."""
        ended = [False] * len(tokens)
        for row, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            if request is None or request.sampling.grammar is None or token == NOTHING:
                continue
            if not request.pending:  # it has ended, or was preempted and draws again
                continue
            try:
                follower = self.of(request)
                follower.follow([*request.output_tokens, token])
                ended[row] = follower.ended
            except Exception as error:  # noqa: BLE001 - whatever becomes of one request
                self.faults.append(RequestFault(request, error))
        return ended

    def follow_run(self, request: Request, run: list[int]) -> tuple[list[int], bool]:
        """What of a run its grammar admits, taken in, and whether the output ends with it."""
        if request.sampling.grammar is None or not request.pending or run[0] == NOTHING:
            return run, False
        try:
            follower = self.of(request)
            for place in range(len(run)):
                follower.follow([*request.output_tokens, *run[: place + 1]])
                if follower.ended:
                    return run[: place + 1], True
        except Exception as error:  # noqa: BLE001 - whatever becomes of one request
            self.faults.append(RequestFault(request, error))
        return run, False
