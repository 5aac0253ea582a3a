"""What a model is measured by. Everywhere, 1 and "positive" mean a defect."""

from dataclasses import asdict, dataclass

import numpy as np

THRESHOLD = 0.5  # of the probability; the accuracy that decides on registration is taken at it


@dataclass(frozen=True)
class Scores:
    """Counts and rates at one threshold.

    Attributes:
        defects_found: defects with the verdict defect.
        defects_missed: defects with the verdict ok.
        ok_rejected: good parts with the verdict defect.
        ok_passed: good parts with the verdict ok.
        roc_auc: area under the ROC curve, in [0, 1].
    """

    defects_found: int
    defects_missed: int
    ok_rejected: int
    ok_passed: int
    roc_auc: float

    @property
    def pictures(self) -> int:
        """How many pictures were scored."""
        return sum(self.counts().values())

    @property
    def accuracy(self) -> float:
        """Share of right verdicts, in [0, 1]."""
        return (self.defects_found + self.ok_passed) / self.pictures

    @property
    def recall_def_front(self) -> float:
        """Share of the defects that are found, in [0, 1]."""
        return self.defects_found / (self.defects_found + self.defects_missed)

    @property
    def recall_ok_front(self) -> float:
        """Share of the good parts that pass, in [0, 1]."""
        return self.ok_passed / (self.ok_passed + self.ok_rejected)

    def counts(self) -> dict[str, int]:
        """Return the confusion matrix by name."""
        return {name: value for name, value in asdict(self).items() if name != "roc_auc"}

    def table(self) -> str:
        """Lay the confusion matrix out: rows are the folders, columns the verdicts."""
        return (
            "               verdict defect  verdict ok\n"
            f"  def_front  {self.defects_found:16}  {self.defects_missed:10}\n"
            f"  ok_front   {self.ok_rejected:16}  {self.ok_passed:10}"
        )

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name, as they are logged."""
        rates = ("accuracy", "recall_def_front", "recall_ok_front")
        return asdict(self) | {name: getattr(self, name) for name in rates}


def is_defect(probabilities: np.ndarray | float, threshold: float) -> np.ndarray | bool:
    """Turn probabilities of a defect into verdicts, True = defect."""
    return probabilities >= threshold


def score(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> Scores:
    """Compare probabilities (n,) with labels (n,), 1 = defect; both classes must be there."""
    from sklearn.metrics import roc_auc_score  # 1 s that inference does not need

    defect, found = labels == 1, is_defect(probabilities, threshold)
    return Scores(
        defects_found=int((defect & found).sum()),
        defects_missed=int((defect & ~found).sum()),
        ok_rejected=int((~defect & found).sum()),
        ok_passed=int((~defect & ~found).sum()),
        roc_auc=float(roc_auc_score(labels, probabilities)),
    )
