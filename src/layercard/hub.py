"""Whether the Hugging Face hub can be reached, asked once: its clients retry each file for most of a minute."""

import huggingface_hub.constants
import huggingface_hub.utils


def hub_answers() -> bool:
    """Whether the hub answers within ten seconds; false in its client's offline mode."""
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10.0)
    except Exception:  # the client's own network errors, or its offline mode
        return False
    return True
