"""How many tokens a prompt has: exact for tokens, else text bytes by a ratio that is learned from engines' counts."""

from kairos.adapters.gateway.bodies import Text

_BYTES_PER_TOKEN = 4.0
_MEMORY = 0.05
"""Weight of the newest request in the ratio."""
_LEAST, _MOST = 0.5, 20.0


class TokenEstimates:
    """One ratio a model.

    Args:
        media_tokens: what an image or a sound counts as.
    """

    def __init__(self, media_tokens: int) -> None:
        self._media_tokens = media_tokens
        self._ratios: dict[str, float] = {}

    def bytes_per_token(self, model: str) -> float:
        """The ratio in use."""
        return self._ratios.get(model, _BYTES_PER_TOKEN)

    def tokens(self, model: str, text: Text) -> int:
        """Estimated prompt tokens of a request, all its prompts together."""
        by_text = text.text_bytes / self.bytes_per_token(model)
        return max(1, round(text.tokens + by_text + text.media * self._media_tokens))

    def learn(self, model: str, text: Text, counted: int) -> None:
        """Take in what an engine counted for a request of text alone."""
        if not text.text_bytes or text.media or text.tokens or text.sequences > 1 or counted < 1:
            return
        ratio = min(max(text.text_bytes / counted, _LEAST), _MOST)
        self._ratios[model] = (1 - _MEMORY) * self.bytes_per_token(model) + _MEMORY * ratio
