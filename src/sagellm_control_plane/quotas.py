"""How much of the control plane one tenant may use: requests at the same time, and tokens a minute.

Tokens are reserved when a request is admitted, by what it is expected to need, and settled at its end by what it was:
so a burst cannot overdraw its quota before the first answer is there, and nobody pays for tokens that were never made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import Field

from sagellm_protocol import ResourceExhaustedError
from sagellm_protocol.model import EdgeModel

_SPARE = 1024  # tenants known beyond those that are active, before they are looked through


class TenantQuota(EdgeModel):
    """What one tenant may use; None is no limit."""

    max_concurrent: int | None = Field(default=None, ge=1, description="Requests waiting and running together.")
    tokens_per_minute: int | None = Field(default=None, ge=1, description="Of prompts and answers together.")


class QuotaConfig(EdgeModel):
    """The quotas of a control plane."""

    default: TenantQuota = Field(default_factory=TenantQuota, description="Of each tenant that has no own.")
    tenants: dict[str, TenantQuota] = Field(default_factory=dict)

    def of(self, tenant: str) -> TenantQuota:
        """The quota of a tenant."""
        tenants: Mapping[str, TenantQuota] = self.tenants
        return tenants.get(tenant, self.default)


@dataclass(slots=True, eq=False)
class Reservation:
    """What one request holds of its tenant's quota, until it is settled."""

    tenant: str
    num_tokens: int
    is_settled: bool = field(default=False, init=False)


@dataclass(slots=True)
class _Account:
    """A bucket that fills by its quota; below 0 if answers were longer than expected."""

    num_tokens: float
    updated_at: float
    num_active: int = 0


class Quotas:
    """The accounts of all tenants. Times are seconds of the control plane's clock; belongs to one event loop."""

    def __init__(self, config: QuotaConfig) -> None:
        self._config = config
        self._accounts: dict[str, _Account] = {}
        self._look_through_at = _SPARE

    def reserve(self, tenant: str, num_tokens: int, now: float) -> Reservation:
        """Let a request in that is expected to need so many tokens; whoever calls this settles it once.

        Raises `ResourceExhaustedError` where the tenant has too much in work, or too few tokens left; the latter holds
        `retry_after_s`. A request for more than a minute's tokens passes when the minute is whole.
        """
        quota = self._config.of(tenant)
        account = self._account(tenant, quota, now)
        if quota.max_concurrent is not None and account.num_active >= quota.max_concurrent:
            raise ResourceExhaustedError(
                f"the tenant {tenant!r} may have {quota.max_concurrent} requests in work at the same time; try again "
                "when one has ended",
                field="tenant",
            )
        if quota.tokens_per_minute is not None:
            missing = min(num_tokens, quota.tokens_per_minute) - account.num_tokens
            if missing > 1e-6:
                wait_s = missing * 60 / quota.tokens_per_minute
                raise ResourceExhaustedError(
                    f"the tenant {tenant!r} may use {quota.tokens_per_minute} tokens a minute and has "
                    f"{max(0, int(account.num_tokens))} left, this needs about {num_tokens}; "
                    f"try again in {wait_s:.0f} s",
                    field="tenant",
                    retry_after_s=wait_s,
                )
            account.num_tokens -= num_tokens
        account.num_active += 1
        return Reservation(tenant, num_tokens)

    def settle(self, reservation: Reservation, num_tokens: int, now: float) -> None:
        """The request is over and has used so many tokens; a second call changes nothing."""
        if reservation.is_settled:
            return
        reservation.is_settled = True
        quota = self._config.of(reservation.tenant)
        account = self._account(reservation.tenant, quota, now)
        account.num_active -= 1
        if quota.tokens_per_minute is not None:
            account.num_tokens += reservation.num_tokens - num_tokens

    def num_active(self, tenant: str) -> int:
        """Requests of a tenant that hold a reservation."""
        account = self._accounts.get(tenant)
        return 0 if account is None else account.num_active

    def _account(self, tenant: str, quota: TenantQuota, now: float) -> _Account:
        """The tenant's account, filled up to now."""
        account = self._accounts.get(tenant)
        limit = quota.tokens_per_minute or 0
        if account is None:
            self._forget_the_whole(now)
            account = self._accounts[tenant] = _Account(float(limit), now)
        passed_s = max(0.0, now - account.updated_at)
        account.num_tokens = min(float(limit), account.num_tokens + passed_s * limit / 60)
        account.updated_at = now
        return account

    def _forget_the_whole(self, now: float) -> None:
        """Accounts that are full and hold nothing are as good as none."""
        if len(self._accounts) < self._look_through_at:
            return
        for tenant, account in list(self._accounts.items()):
            limit = self._config.of(tenant).tokens_per_minute or 0
            filled = account.num_tokens + (now - account.updated_at) * limit / 60
            if not account.num_active and filled >= limit:
                del self._accounts[tenant]
        self._look_through_at = 2 * len(self._accounts) + _SPARE
