"""Generate answers with trained weights: base and tuned side by side, or in a chat."""

from nybble.generation.chat import Chat, Reply
from nybble.generation.questions import Answer, ask, read_questions

__all__ = ["Answer", "Chat", "Reply", "ask", "read_questions"]
