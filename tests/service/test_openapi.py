"""The description of the API is kept: whatever is sent, what comes back is what it says."""

import io
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance
from schemathesis.core.failures import FailureGroup
from starlette.datastructures import Headers

from service import uploads
from service.answers import FRAMES
from service.app import create_app
from service.bundle.manifest import DEFAULT_LOD
from service.errors import (
    AvatarNotFound,
    AvatarServiceError,
    BundleInvalid,
    DeadlinePassed,
    InvalidPose,
    JobNotFound,
    OptionInvalid,
    PreconditionFailed,
    VersionNotFound,
)
from service.reposing import deadline_of
from service.settings import Settings

EXAMPLES = 6
"""For each operation and mode, the same in every run."""

BEYOND_A_SCHEMA = {
    # That a name has the right letters does not mean that somebody has it.
    *(error.code for error in (AvatarNotFound, JobNotFound, VersionNotFound)),
    "not-found",
    # Nor that a digest is one of the version that is there.
    PreconditionFailed.code,
    # Which bytes are a bundle or an archive of poses, which lists are of one length, which numbers are a rotation, and
    # which options go together.
    BundleInvalid.code,
    *(error.code for error in (InvalidPose, *InvalidPose.__subclasses__())),
    # Nor is there a time that is enough on every machine.
    DeadlinePassed.code,
}
"""Why something may be refused that is as the description says."""


@pytest.fixture
def document(bundle_dir: Path) -> dict[str, Any]:
    return create_app(Settings(bundle_dir=bundle_dir)).openapi()


@pytest.fixture
def address(
    bundle_dir: Path, tmp_path: Path, run_server: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, int]]:
    async def vet(_: Path) -> None:  # it has its own tests, and takes a second
        await anyio.lowlevel.checkpoint()

    monkeypatch.setattr(uploads, "vet", vet)
    shutil.copytree(bundle_dir / "tiny", tmp_path / "avatars" / "tiny")
    app = create_app(Settings(bundle_dir=tmp_path / "avatars", jobs_dir=tmp_path / "jobs", threads=1))
    with run_server(app) as address:
        yield address


def bodies(bundle: Path) -> st.SearchStrategy[bytes]:
    """Something of each kind that is posted, and nonsense."""
    archive, poses = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        for path in bundle.iterdir():
            opened.writestr(path.name, path.read_bytes())
    np.savez(poses, poses=np.zeros((2, 72), np.float32))
    return st.sampled_from([archive.getvalue(), poses.getvalue()]) | st.binary(max_size=200)


def test_whatever_is_sent_the_answer_is_as_described(
    address: tuple[str, int], document: dict[str, Any], bundle_dir: Path
) -> None:
    for operation in operations(document):
        for kind in set(operation.get("requestBody", {}).get("content", ())) - {"application/json"}:
            schemathesis.openapi.media_type(kind, bodies(bundle_dir / "tiny"))
    schema = schemathesis.openapi.from_url(f"http://{address[0]}:{address[1]}/openapi.json")
    failures = []
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode:
            try:
                send(operation, mode)
            except Unsatisfiable:
                # Where every text is a valid name, nothing invalid can be sent.
                assert mode is GenerationMode.NEGATIVE, operation.label
            except (Exception, FailureGroup) as error:
                failures.append(f"{operation.label}, {mode.value}: {error}")
    assert not failures, "\n\n".join(failures)


def send(operation: Any, mode: GenerationMode) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and "avatar_id" in case.path_parameters and case.method != "DELETE":
            case.path_parameters["avatar_id"] = "tiny"
        if mode is GenerationMode.POSITIVE and "lod" in (case.query or {}):
            case.query["lod"] = DEFAULT_LOD
        # In its place is what follows, which goes by the reason and not by the status alone.
        answer = case.call_and_validate(excluded_checks=[positive_data_acceptance])
        if mode is GenerationMode.POSITIVE and answer.status_code >= 400:
            assert answer.json()["code"] in BEYOND_A_SCHEMA, answer.text
            assert "errors" not in answer.json(), answer.text  # those of a parameter, of which the schema says all

    call()


def operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [operation for item in document["paths"].values() for operation in item.values()]


def test_whatever_has_a_body_may_be_told_that_it_came_too_slowly(document: dict[str, Any]) -> None:
    with_body = [operation for operation in operations(document) if "requestBody" in operation]
    assert {"repose", "create_job", "put_avatar", "read_poses"} == {each["operationId"] for each in with_body}
    assert all({"408", "413"} <= set(operation["responses"]) for operation in with_body)


OURS = re.compile("reposer-.*|etag|x-cache|server-timing|content-disposition|warning")
"""Headers that an answer has from this service, and from none below or before it."""


@pytest.mark.anyio
async def test_every_header_that_an_answer_has_is_described_and_the_other_way_round(
    serve: Any, document: dict[str, Any]
) -> None:
    url, body = "/avatars/tiny/repose", {"poses": [[0.0] * 165] * 4, "fps": 60}
    async with serve() as client:
        plain = await client.post(url, json=body)
        # What is there only now and then: another rate, fingers that are left out, an answer that is not kept.
        more = await client.post(f"{url}?target_fps=30", json=body, headers={"Cache-Control": "no-store"})
        known = await client.post(url, json=body, headers={"If-None-Match": plain.headers["etag"]})
        read = await client.post("/avatars/tiny/poses", json=body)
    assert [answer.status_code for answer in (plain, more, known, read)] == [200, 200, 304, 200]
    repose = document["paths"]["/avatars/{avatar_id}/repose"]["post"]["responses"]
    read_poses = document["paths"]["/avatars/{avatar_id}/poses"]["post"]["responses"]
    every: set[str] = set()
    for answer, response in ((plain, repose["200"]), (more, repose["200"]), (known, repose["304"]),
                             (read, read_poses["200"])):  # fmt: skip
        described = {name.lower(): header for name, header in response["headers"].items()}
        has = {name.lower() for name in answer.headers}
        assert {name for name in has if OURS.fullmatch(name)} <= described.keys()
        assert {name for name, header in described.items() if header["required"]} <= has
        assert all(header["description"].endswith(".") for header in described.values())
        every |= has if answer is not read else set()
    assert {name.lower() for name in repose["200"]["headers"]} <= every


def test_the_headers_of_a_request_are_described(document: dict[str, Any]) -> None:
    parameters = document["paths"]["/avatars/{avatar_id}/repose"]["post"]["parameters"]
    headers = {each["name"]: each["schema"] for each in parameters if each["in"] == "header"}
    assert headers.keys() == {"If-None-Match", "Request-Timeout", "X-Deadline-Ms", "Cache-Control"}
    for name, scale in (("Request-Timeout", 1), ("X-Deadline-Ms", 1000)):
        longest = headers[name]["maximum"]
        assert longest == 86400 * scale
        assert deadline_of(Headers({name: str(longest)})) is not None
        for refused in (0, longest + 1):
            with pytest.raises(OptionInvalid):
                deadline_of(Headers({name: str(refused)}))


@pytest.mark.anyio
async def test_every_example_of_what_is_posted_is_accepted(serve: Any, document: dict[str, Any]) -> None:
    posted = 0
    async with serve() as client:
        for path, item in document["paths"].items():
            content = item.get("post", {}).get("requestBody", {}).get("content", {})
            if "example" in (schema := content.get("application/json", {}).get("schema", {})):
                url = path.replace("{avatar_id}", "tiny")
                answer = await client.post(url, json=schema["example"], headers={"Accept": FRAMES})
                assert answer.status_code in (200, 202), answer.text
                posted += 1
    assert posted >= 2


def test_every_error_has_an_example(document: dict[str, Any]) -> None:
    described = {
        (value["status"], code): value
        for response in document["components"]["responses"].values()
        for code, example in response["content"]["application/problem+json"]["examples"].items()
        for value in [example["value"]]
    }
    for error in tree(AvatarServiceError):
        value = described[error.status, error.code]
        assert (value["title"], value["type"]) == (error.title, f"urn:reposer:problem:{error.code}")
        assert ("detail" in value) == (error.status < 500)


def tree(root: type[AvatarServiceError]) -> list[type[AvatarServiceError]]:
    return [root] + [error for child in root.__subclasses__() for error in tree(child)]


def test_every_operation_names_its_problems(document: dict[str, Any]) -> None:
    responses = document["components"]["responses"]
    for operation in operations(document):
        problems = {status: response for status, response in operation["responses"].items() if int(status) >= 400}
        assert {"400", "404", "500"} <= set(problems)
        for status, response in problems.items():
            content = responses[response["$ref"].rpartition("/")[2]]["content"]["application/problem+json"]
            assert content["examples"]
            assert {example["value"]["status"] for example in content["examples"].values()} == {int(status)}
        assert operation["operationId"]
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])
