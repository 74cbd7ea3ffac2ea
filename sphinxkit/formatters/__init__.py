"""Text in and out of the model: conversation templates, and the tasks in ``sphinxkit.formatters.tasks``."""

from sphinxkit.formatters import tasks
from sphinxkit.formatters.conversation import (
    ConversationTemplate,
    EncodedConversation,
    RenderedConversation,
    sphinx_v1,
)
from sphinxkit.formatters.labels import IGNORE_INDEX, next_token_targets
from sphinxkit.registry import Registry

registry: Registry[ConversationTemplate] = Registry("conversation", {"sphinx_v1": sphinx_v1})
register = registry.register
create = registry.build
names = registry.names

__all__ = [
    "IGNORE_INDEX",
    "ConversationTemplate",
    "EncodedConversation",
    "RenderedConversation",
    "create",
    "names",
    "next_token_targets",
    "register",
    "registry",
    "sphinx_v1",
    "tasks",
]
