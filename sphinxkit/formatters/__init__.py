"""Text input and output: conversation templates, and the tasks in ``sphinxkit.formatters.tasks``."""

from sphinxkit.formatters import tasks
from sphinxkit.formatters.base import (
    ConversationTemplate,
    EncodedConversation,
    RenderedConversation,
    create,
    names,
    register,
    registry,
)
from sphinxkit.formatters.conversation import sphinx_v1
from sphinxkit.formatters.detections import to_detections
from sphinxkit.formatters.labels import IGNORE_INDEX, label_text, next_token_targets
from sphinxkit.formatters.messages import IMAGE_PLACEHOLDER, Message, check_messages, clean_content

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_PLACEHOLDER",
    "ConversationTemplate",
    "EncodedConversation",
    "Message",
    "RenderedConversation",
    "check_messages",
    "clean_content",
    "create",
    "label_text",
    "names",
    "next_token_targets",
    "register",
    "registry",
    "sphinx_v1",
    "tasks",
    "to_detections",
]
