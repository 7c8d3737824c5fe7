"""The configuration of sequence-level distillation.

Annotations here are types and not strings: reading strings is a twentieth of what `--help` takes.
"""

from dataclasses import dataclass

from dlmone_fast.config.repeated import Strings
from dlmone_fast.config.section import Section, one_of, within
from dlmone_fast.errors import ConfigError


@dataclass(frozen=True)
class DistillationConfig(Section):
    """The sources, models and settings that make a distilled training folder."""

    data_dir: str = ""
    """Folder with {train,valid,test}.jsonl[.gz]: the sources of train get new targets, valid and
    test are copied."""
    output_dir: str = ""
    """Folder to write; OUTPUT_DIR.parts beside it holds what is done while it runs."""
    model: Strings = ()
    """Model folder of dlmone_fast.train_autoregressive. Given several times: the majority of the
    models' greedy texts."""
    samples: int = 1
    """Texts of each source."""
    temperature: float = 0.7
    """Of the draws; 0: the greedy text."""
    top_p: float = 0.9
    top_k: int = 40
    """Most likely tokens that are drawn from; 0: all."""
    both_directions: bool = False
    """The targets of the training split are sources as well."""
    sources: str = ""
    """File of further sources, one a line."""
    exclude: Strings = ()
    """A split of --data-dir or a file, one source a line, whose sources are kept out of training;
    may be given several times. Default: test, where there is one."""
    drop_repeats: str = "auto"
    """Leave out texts that say a word twice in a row: yes, no, or auto: yes for wordpiece, no for
    symbols, where that can be right."""
    seed: int = 0
    batch_size: int = 256
    part_size: int = 4096
    """Sources after which what is done is saved."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 where the hardware multiplies it natively."""

    def check(self) -> None:
        within(self, 1, 1024, "samples")
        within(self, 0, 100, "temperature")
        within(self, 1e-6, 1, "top_p")
        within(self, 0, 1 << 20, "top_k")
        within(self, 0, (1 << 63) - 1, "seed")
        within(self, 1, 1 << 16, "batch_size")
        within(self, 1, 1 << 20, "part_size")
        one_of(self, ("auto", "yes", "no"), "drop_repeats")
        one_of(self, ("auto", "fp32", "bf16"), "precision")
        for name in ("data_dir", "output_dir", "model"):
            if not getattr(self, name):
                raise ConfigError(f"--{name.replace('_', '-')} is missing; name a folder")
        if self.samples > 1 and (len(self.model) > 1 or not self.temperature):
            raise ConfigError(
                "samples must be 1 with several models and at temperature 0, which give one text "
                f"a source; got {self.samples}"
            )
        if len(set(self.model)) != len(self.model):
            raise ConfigError(
                "model: a folder is named twice, which would count its vote twice; name each once"
            )
