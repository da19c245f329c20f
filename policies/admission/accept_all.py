"""Take everyone: the default."""

from kairos.scheduler_core.policy import Admission, AdmissionView


class AcceptAll:
    """Accept every request."""

    needs_prediction = False

    def admit(self, view: AdmissionView) -> Admission:
        """Accepted."""
        return Admission(accept=True)
