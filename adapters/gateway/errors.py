"""How a request can end without its answer, in the OpenAI error shape (docs/gateway.md)."""

import msgspec


class CallError(Exception):
    """A request ends with an error of the OpenAI shape.

    Args:
        status: of HTTP.
        code: a short name that programs read, and that outcomes are counted by.
        retry_after_s: when to come back; None: coming back does not help, or nobody knows.
        may_retry: whether the gateway may try once more, as long as the client has nothing.
    """

    def __init__(
        self, status: int, code: str, message: str, retry_after_s: int | None = None, may_retry: bool = False
    ) -> None:
        self.status, self.code, self.message, self.retry_after_s = status, code, message, retry_after_s
        self.may_retry = may_retry
        super().__init__(message)


class EngineRefusal(CallError):
    """An engine's own 4xx answer: its body is passed on as it came."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status, f"engine_{status}", "refused by the engine")
        self.body = body


_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


def error_body(error: CallError) -> bytes:
    """The body of an error.

    >>> error_body(CallError(404, "model_not_found", "no such model"))
    b'{"error":{"message":"no such model","type":"not_found_error","param":null,"code":"model_not_found"}}'
    """
    if isinstance(error, EngineRefusal):
        return error.body
    kind = _KINDS.get(error.status, "server_error")
    return msgspec.json.encode({"error": {"message": error.message, "type": kind, "param": None, "code": error.code}})


def error_event(error: CallError) -> bytes:
    """The event that ends a stream which has begun."""
    return b"data: " + error_body(error) + b"\n\ndata: [DONE]\n\n"
