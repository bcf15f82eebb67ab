"""Secrets are found where people keep them, nearest first, and their values are never shown."""

from __future__ import annotations

import sys
import types

import pytest

from medcot import secrets
from medcot.secrets import HIDDEN, Secret, SecretName, find_endpoint_key, find_secret, redact

TOKEN = "hf_" + "abcDEF123" * 4
KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """A machine on which no secret is to be found."""
    for names in secrets.ENVIRONMENT.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(secrets, "_found", set())
    secrets._from_kaggle.cache_clear()
    secrets._from_colab.cache_clear()
    yield
    secrets._from_kaggle.cache_clear()
    secrets._from_colab.cache_clear()


def _fake_kaggle(monkeypatch, held: dict[str, str]) -> None:
    module = types.ModuleType("kaggle_secrets")
    module.__spec__ = types.SimpleNamespace()

    class BackendError(Exception):
        pass

    class CredentialError(Exception):
        pass

    class UserSecretsClient:
        def get_secret(self, label: str) -> str:
            if label not in held:
                raise BackendError(f"No user secrets exist for kernel with label {label}")
            return held[label]

    module.BackendError, module.CredentialError = BackendError, CredentialError
    module.UserSecretsClient = UserSecretsClient
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)


def _fake_colab(monkeypatch, held: dict[str, str]) -> None:
    colab, userdata = types.ModuleType("google.colab"), types.ModuleType("google.colab.userdata")
    for name in ("SecretNotFoundError", "NotebookAccessError", "TimeoutException"):
        setattr(userdata, name, type(name, (Exception,), {}))

    def get(key: str) -> str:
        if key not in held:
            raise userdata.SecretNotFoundError(key)
        return held[key]

    userdata.get = get
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setitem(sys.modules, "google.colab.userdata", userdata)


def test_absent_is_fine():
    assert find_secret(SecretName.HUGGING_FACE) is None
    assert find_secret(SecretName.WANDB) is None
    assert redact("nothing to hide") == "nothing to hide"


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        (SecretName.HUGGING_FACE, "HF_TOKEN"),
        (SecretName.HUGGING_FACE, "HUGGINGFACE_TOKEN"),
        (SecretName.WANDB, "WANDB_API_KEY"),
    ],
)
def test_environment(monkeypatch, name, variable):
    monkeypatch.setenv(variable, f" {TOKEN}\n")  # as a pasted value arrives
    found = find_secret(name)
    assert found == Secret(TOKEN, f"environment variable {variable}")


def test_blank_variable_is_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "  ")
    assert find_secret(SecretName.HUGGING_FACE) is None


def test_kaggle_uses_the_tutorials_names(monkeypatch):
    _fake_kaggle(monkeypatch, {"HUGGINGFACE_TOKEN": TOKEN, "wandb": KEY})
    assert find_secret(SecretName.HUGGING_FACE) == Secret(TOKEN, "Kaggle secret HUGGINGFACE_TOKEN")
    assert find_secret(SecretName.WANDB) == Secret(KEY, "Kaggle secret wandb")


def test_kaggle_without_that_secret(monkeypatch):
    _fake_kaggle(monkeypatch, {})
    assert find_secret(SecretName.WANDB) is None


def test_colab(monkeypatch):
    _fake_colab(monkeypatch, {"HF_TOKEN": TOKEN, "wandb": KEY})
    assert find_secret(SecretName.HUGGING_FACE) == Secret(TOKEN, "Colab secret HF_TOKEN")
    assert find_secret(SecretName.WANDB) == Secret(KEY, "Colab secret wandb")


def test_environment_comes_before_the_vault(monkeypatch):
    _fake_colab(monkeypatch, {"HF_TOKEN": "hf_from_the_vault"})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert find_secret(SecretName.HUGGING_FACE).value == TOKEN


def test_hugging_face_login(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    found = find_secret(SecretName.HUGGING_FACE)
    assert found.value == TOKEN and found.where.startswith("Hugging Face log-in")


def test_wandb_login_in_netrc(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text(
        f"machine api.wandb.ai\n  login user\n  password {KEY}\nmachine my.host:8080\n  login user\n  password other\n"
    )
    assert find_secret(SecretName.WANDB).value == KEY
    monkeypatch.setenv("WANDB_BASE_URL", "http://my.host:8080")
    assert find_secret(SecretName.WANDB).value == "other"


def test_broken_netrc_is_no_login(tmp_path):
    (tmp_path / "netrc").write_text("machine\n  nonsense here\n")
    assert find_secret(SecretName.WANDB) is None


def test_value_is_never_shown():
    secret = Secret(TOKEN, "environment variable HF_TOKEN")
    for shown in (repr(secret), str(secret), f"{secret}", repr([secret]), "%s" % secret):  # noqa: UP031 - a path too
        assert TOKEN not in shown and "HF_TOKEN" in shown


def test_redact_hides_what_was_found(monkeypatch):
    _fake_kaggle(monkeypatch, {"wandb": KEY})
    find_secret(SecretName.WANDB)
    assert redact(f"401 for key {KEY} at host") == f"401 for key {HIDDEN} at host"


def test_redact_hides_the_environment_unasked(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HUGGINGFACE_TOKEN", TOKEN + "longer")
    assert redact(f"a {TOKEN}longer b {TOKEN}") == f"a {HIDDEN} b {HIDDEN}"


def test_redact_leaves_short_words_alone(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "test")
    assert redact("a test") == "a test"


def test_looking_writes_nothing_into_the_environment(monkeypatch):
    import os

    _fake_colab(monkeypatch, {"HF_TOKEN": TOKEN, "wandb": KEY})
    before = dict(os.environ)
    find_secret(SecretName.HUGGING_FACE)
    find_secret(SecretName.WANDB)
    assert dict(os.environ) == before


def test_a_servers_key_is_looked_for_by_its_host(monkeypatch):
    hosts = {"api.openai.com": "OPENAI", "api.deepseek.com": "DEEPSEEK", "openrouter.ai": "OPENROUTER", "a.b": "MEDCOT"}
    for host, name in hosts.items():
        assert find_endpoint_key(host) is None
        monkeypatch.setenv(f"{name}_API_KEY", f"sk-for-{name}")
    for host, name in hosts.items():
        assert find_endpoint_key(host) == Secret(f"sk-for-{name}", f"environment variable {name}_API_KEY")
        monkeypatch.delenv(f"{name}_API_KEY")
        assert find_endpoint_key(host) is None, "a key is for one host"
    with pytest.raises(AssertionError):
        find_secret(SecretName.ENDPOINT)


def test_a_servers_key_in_a_vault_and_under_a_name_of_ones_own(monkeypatch):
    _fake_kaggle(monkeypatch, {"OPENAI_API_KEY": KEY})
    assert find_endpoint_key("api.openai.com") == Secret(KEY, "Kaggle secret OPENAI_API_KEY")
    assert find_endpoint_key("api.deepseek.com") is None
    monkeypatch.setenv("MINE", TOKEN)
    assert find_endpoint_key("api.openai.com", "MINE") == Secret(TOKEN, "environment variable MINE")
    assert redact(f"{TOKEN} {KEY}") == f"{HIDDEN} {HIDDEN}"


def test_a_servers_key_is_hidden_unasked(monkeypatch):
    monkeypatch.setenv("DEEPSEEK_API_KEY", KEY)
    assert redact(f"401: {KEY}") == f"401: {HIDDEN}"


def test_the_doctor_says_whose_keys_there_are_and_not_what_they_are(monkeypatch):
    from medcot.doctor import _look_at_secrets

    assert "API key of a model server: none found" in _look_at_secrets()[-1].text
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("MEDCOT_API_KEY", TOKEN)
    text = _look_at_secrets()[-1].text
    assert "OPENAI_API_KEY, for api.openai.com; " in text and "MEDCOT_API_KEY, for any other server" in text
    assert KEY not in text and TOKEN not in text and "DEEPSEEK" not in text
