"""Avatars are put, replaced, gone back to, loaded, unloaded and deleted."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from service.bundle.files import read_bundle

pytestmark = pytest.mark.anyio
ZIP = {"Content-Type": "application/zip"}
POSES = {"poses": [[0.1] * 72]}


def work_left(folder: Path) -> list[str]:
    return [path.name for path in (folder / ".uploads").iterdir()] if (folder / ".uploads").exists() else []


async def iou_of(client: httpx.AsyncClient, avatar_id: str = "tiny") -> float:
    return (await client.get(f"/avatars/{avatar_id}")).json()["metrics"]["iou"]


async def test_a_new_avatar_is_served_at_once(serve: Any, folder: Path, make_bundle: Any, zip_of: Any) -> None:
    bundle = make_bundle("new-one")
    async with serve(bundle_dir=folder) as client:
        assert (await client.post("/avatars/new-one/repose", json=POSES)).status_code == 404
        answer = await client.put("/avatars/new-one", content=zip_of(bundle), headers=ZIP)
        assert (answer.status_code, answer.json()["id"]) == (201, "new-one")
        assert answer.headers["etag"] == f'"{read_bundle(bundle).digest}"'
        assert (await client.post("/avatars/new-one/repose", json=POSES)).status_code == 200
        again = await client.put("/avatars/new-one", content=zip_of(bundle), headers=ZIP)
        assert (again.status_code, again.headers["etag"]) == (200, answer.headers["etag"])
        assert len((await client.get("/avatars/new-one/versions")).json()["versions"]) == 1
    assert read_bundle(folder / "new-one").digest == read_bundle(bundle).digest
    assert not work_left(folder)


@pytest.mark.usefixtures("no_vetting")
async def test_versions_can_be_gone_back_to(serve: Any, folder: Path, make_bundle: Any, zip_of: Any) -> None:
    async with serve(bundle_dir=folder, kept_versions=2) as client:
        for iou in (0.1, 0.2, 0.3):
            answer = await client.put("/avatars/tiny", content=zip_of(make_bundle(iou=iou)), headers=ZIP)
            assert answer.status_code == 200
            assert await iou_of(client) == iou
        versions = (await client.get("/avatars/tiny/versions")).json()["versions"]
        expected = [read_bundle(make_bundle(iou=iou)).digest for iou in (0.3, 0.2, 0.1)]
        assert [version["digest"] for version in versions] == expected
        assert [version["replaced_at"] is None for version in versions] == [True, False, False]

        back = await client.post(f"/avatars/tiny/load?version={expected[2]}")
        assert (back.status_code, back.headers["etag"]) == (200, f'"{expected[2]}"')
        assert await iou_of(client) == 0.1
        versions = (await client.get("/avatars/tiny/versions")).json()["versions"]
        assert [version["digest"] for version in versions] == [expected[2], expected[0], expected[1]]
        gone = await client.post(f"/avatars/tiny/load?version={'0' * 64}")
        assert (gone.status_code, gone.json()["code"]) == (404, "version-not-found")
    assert not work_left(folder)


@pytest.mark.usefixtures("no_vetting")
async def test_to_ask_again_for_a_version_says_that_it_was_done(
    serve: Any, folder: Path, make_bundle: Any, zip_of: Any
) -> None:
    """Also on the condition that was true before, and where another replica did it and its word was not heard."""

    async def served(client: httpx.AsyncClient) -> str:
        return (await client.post("/avatars/tiny/repose", json=POSES)).headers["reposer-bundle"]

    old, new = read_bundle(folder / "tiny").digest, read_bundle(bundle := make_bundle(iou=0.9)).digest
    async with serve(bundle_dir=folder) as client, serve(bundle_dir=folder) as deaf:
        assert await served(deaf) == old
        assert (await client.put("/avatars/tiny", content=zip_of(bundle), headers=ZIP)).status_code == 200
        assert (await served(client), await served(deaf)) == (new, old)
        for replica in (client, deaf):
            answer = await replica.post(f"/avatars/tiny/load?version={new}", headers={"If-Match": f'"{old}"'})
            assert (answer.status_code, answer.headers["etag"], await served(replica)) == (200, f'"{new}"', new)
        versions = (await deaf.get("/avatars/tiny/versions")).json()["versions"]
        assert [version["digest"] for version in versions] == [new, old]
        other = await deaf.post(f"/avatars/tiny/load?version={old}", headers={"If-Match": f'"{old}"'})
        assert (other.status_code, await served(deaf)) == (412, new)
    assert not work_left(folder)


@pytest.mark.usefixtures("no_vetting")
async def test_conditions_are_kept(serve: Any, folder: Path, make_bundle: Any, zip_of: Any) -> None:
    body = zip_of(make_bundle(iou=0.9))
    async with serve(bundle_dir=folder) as client:
        tag = (await client.get("/avatars/tiny")).headers["etag"]

        async def put(**condition: str) -> int:
            headers = ZIP | {name.replace("_", "-"): value for name, value in condition.items()}
            return (await client.put("/avatars/tiny", content=body, headers=headers)).status_code

        assert await put(If_None_Match="*") == 412
        assert await put(If_Match=f'"{"0" * 64}"') == 412
        assert await put(If_Match=f"W/{tag}") == 412
        assert await iou_of(client) == 0.5
        assert await put(If_Match=f'"other", {tag}') == 200
        assert await put(If_Match=tag) == 412
        assert await put(If_Match="*") == 200
        assert (await client.put("/avatars/other", content=body, headers=ZIP | {"If-Match": "*"})).status_code == 412
        assert (await client.delete("/avatars/tiny", headers={"If-Match": tag})).status_code == 412
        assert await iou_of(client) == 0.9


@pytest.mark.usefixtures("no_vetting")
async def test_a_deleted_avatar_is_gone_with_its_versions(
    serve: Any, folder: Path, make_bundle: Any, zip_of: Any
) -> None:
    async with serve(bundle_dir=folder) as client:
        await client.put("/avatars/tiny", content=zip_of(make_bundle()), headers=ZIP)
        assert (await client.delete("/avatars/tiny")).status_code == 204
        for answer in (
            await client.get("/avatars/tiny"),
            await client.get("/avatars/tiny/versions"),
            await client.post("/avatars/tiny/repose", json=POSES),
            await client.post("/avatars/tiny/unload"),
            await client.delete("/avatars/tiny"),
        ):
            assert (answer.status_code, answer.json()["code"]) == (404, "avatar-not-found")
    assert not list((folder / ".versions").iterdir())
    assert not work_left(folder)


async def test_loading_and_unloading(serve: Any, folder: Path) -> None:
    async def status(client: httpx.AsyncClient) -> str:
        return (await client.get("/avatars")).json()["avatars"][0]["status"]

    async with serve(bundle_dir=folder) as client:
        assert (await client.post("/avatars/tiny/load")).status_code == 200
        assert await status(client) == "ready"
        assert (await client.post("/avatars/tiny/unload")).status_code == 204
        assert await status(client) == "stored"
        assert (await client.post("/avatars/tiny/repose", json=POSES)).status_code == 200
        assert await status(client) == "ready"
