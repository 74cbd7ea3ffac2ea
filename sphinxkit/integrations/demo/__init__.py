"""Web page for questions about pictures, made with gradio (``pip install "sphinxkit[demo]"``).

The only network it uses is the port it listens at.
"""

from sphinxkit.integrations.demo.server import import_gradio, serving
from sphinxkit.integrations.demo.talk import FieldError, Form, Reply, Talk

__all__ = ["FieldError", "Form", "Reply", "Talk", "import_gradio", "serving"]
