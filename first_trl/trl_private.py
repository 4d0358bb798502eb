"""Every name of TRL that is not part of its public interface, in one place.

TRL 1.16 promises no stability for these. `tests/test_trl_private.py` checks what we rely on, so that a new TRL fails
there first, with a reason, and nowhere else.
"""

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import get_config_model_id

__all__ = ["DataCollatorForLanguageModeling", "get_config_model_id"]
