"""Answers from what was trained: base beside tuned, and a chat."""

from nybble.generation.chat import Chat, Reply
from nybble.generation.questions import Answer, ask, read_questions

__all__ = ["Answer", "Chat", "Reply", "ask", "read_questions"]
