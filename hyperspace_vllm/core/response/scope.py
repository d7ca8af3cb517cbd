"""Scope and tenant: the tenant of an API key, and the scope that the middleware passes to the connector.

The scope travels from the API server to the scheduler inside the request (`kv_transfer_params.hyperspace`), the only
field that vLLM forwards. Clients can write to it too, so the scope is signed with a secret of this process tree.
"""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, cast

Scope = Literal["private", "network", "public"]

_SCOPES = ("private", "network", "public")


@dataclass(frozen=True, slots=True)
class RequestScope:
    """How far a request's response and KV may travel, and its tenant ('' when the server has one tenant)."""

    scope: Scope
    tenant: str


DEFAULT_SCOPE = RequestScope("network", "")


def api_key_of(api_keys: tuple[str, ...], authorization: str | None) -> str | None:
    """The API key of a request: '' with fewer than two API keys; None for a key that is not in the list."""
    if len(set(api_keys)) < 2:
        return ""
    scheme, _, token = (authorization or "").partition(" ")
    return token if scheme.lower() == "bearer" and token in api_keys else None


def tenant_of(fleet_secret: bytes, api_keys: tuple[str, ...], authorization: str | None) -> str | None:
    """The tenant of a request: '' with fewer than two API keys, else 32 hex digits; None for a key not in the list.

    The HMAC under a secret of the fleet gives a key the same tenant on every server, and cannot be guessed.
    """
    key = api_key_of(api_keys, authorization)
    return key and hmac.digest(fleet_secret, b"hyperspace/tenant/1" + key.encode(), sha256)[:16].hex()


def engine_salt(api_key: str | None, cache_salt: object) -> object:
    """The salt of the engine's own prefix cache: for a tenant the HMAC of the client's salt under its API key.

    So only a client with the key can tell from the time to first token which prompts were sent with it, and all servers
    find a tenant's KV again, also after a restart. A salt that vLLM refuses stays, and so does a salt without a tenant.
    """
    if not api_key or not isinstance(cache_salt, str | None) or cache_salt == "":
        return cache_salt
    return hmac.digest(api_key.encode(), b"hyperspace/cache-salt/1" + _salt_bytes(cache_salt), sha256).hex()


def sign_scope(secret: bytes, scope: Scope, tenant: str, cache_salt: str | None) -> dict[str, str]:
    """The value of kv_transfer_params.hyperspace; the MAC binds it to the request's cache_salt."""
    return {"scope": scope, "tenant": tenant, "mac": _mac(secret, scope, tenant, cache_salt)}


def verify_scope(secret: bytes, signed: object, cache_salt: str | None) -> RequestScope | None:
    """The scope in kv_transfer_params.hyperspace, or None for a value that `sign_scope` did not make."""
    if not isinstance(signed, Mapping):
        return None
    scope, tenant, mac = signed.get("scope"), signed.get("tenant"), signed.get("mac")
    if scope not in _SCOPES or not isinstance(tenant, str) or not isinstance(mac, str) or not mac.isascii():
        return None
    if not hmac.compare_digest(mac, _mac(secret, scope, tenant, cache_salt)):
        return None
    return RequestScope(cast(Scope, scope), tenant)


def _mac(secret: bytes, scope: str, tenant: str, cache_salt: str | None) -> str:
    names = (scope.encode(), tenant.encode("utf-8", "surrogatepass"), _salt_bytes(cache_salt))
    fields = [sha256(field).digest() for field in names]
    return hmac.digest(secret, b"hyperspace/scope/1" + b"".join(fields), sha256).hex()


def _salt_bytes(cache_salt: str | None) -> bytes:
    # A client's text may have lone surrogates, which UTF-8 cannot encode.
    return b"\x00" if cache_salt is None else b"\x01" + cache_salt.encode("utf-8", "surrogatepass")
