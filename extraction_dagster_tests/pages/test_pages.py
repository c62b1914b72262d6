"""What a person sees and clicks in Dagster's pages, in a real browser, and Dagster's own commands beside it."""

import json

import pytest

pytestmark = pytest.mark.slow
ALL_THREE = ["video_frames", "frame_embeddings", "qdrant_points"]
SUCCESS = ("SUCCESS", ALL_THREE)
COPIES = """WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 19)
            INSERT INTO insta_content (id, platform, code, path)
            SELECT 300 + 4 * i + id - 201, platform, code, path FROM insta_content, n WHERE id BETWEEN 201 AND 204"""
NEWEST_RUN = "{ runsOrError(limit: 1) { ... on Runs { results { runId } } } }"
NEWEST_BACKFILL = "{ partitionBackfillsOrError(limit: 1) { ... on PartitionBackfills { results { id status } } } }"
CODE = 'repositoryName: "__repository__", repositoryLocationName: "extraction_dagster"'
ADD_RANGE = f"""mutation ($key: String!) {{ addDynamicPartition(partitionsDefName: "id_ranges", partitionKey: $key,
    repositorySelector: {{{CODE}}}) {{ __typename }} }}"""
# The launchpad of a job begins with the defaults of the job of all assets.
FILLED_IN = f"""{{ runConfigSchemaOrError(selector: {{{CODE}, pipelineName: "__ASSET_JOB"}}) {{
    ... on RunConfigSchema {{ rootDefaultYaml }} }} }}"""
ACCEPTED = f"""query ($job: String!, $config: RunConfigData!) {{ isPipelineConfigValid(mode: "default",
    pipeline: {{{CODE}, pipelineName: $job}}, runConfigData: $config) {{
    __typename ... on RunConfigValidationInvalid {{ errors {{ message }} }} }} }}"""

PICTURES = (
    "Array.from(document.querySelectorAll('.dagster-markdown img'), i => [i.alt, i.naturalWidth, i.naturalHeight])"
)


def test_dagster_dev_starts_without_a_warning(dagster_dev):
    said = (dagster_dev.folder / "dev.log").read_text()
    assert "Serving dagster-webserver" in said
    assert [line for line in said.splitlines() if "warning" in line.lower() or "error" in line.lower()] == []


def test_a_range_that_was_never_registered_can_be_launched(dagster_dev):
    tags = json.dumps({"dagster/partition": "2-7"})
    dagster_dev.run("dagster", "job", "launch", "-w", "workspace.yaml", "-j", "extraction_job", "--tags", tags)
    dagster_dev.wait(lambda: dagster_dev.runs("2-7") == [SUCCESS], seconds=120, what="the run has succeeded")


def test_a_malformed_range_fails_its_run_and_says_why(dagster_dev):
    dagster_dev.launch("seven")
    dagster_dev.wait(lambda: dagster_dev.runs("seven") == [("FAILURE", [])], seconds=120, what="the run has failed")
    assert "'seven' is not a range of ids" in (dagster_dev.folder / "dev.log").read_text()


def test_a_backfill_of_two_ranges_from_the_command_line_succeeds(dagster_dev):
    before = {key: len(dagster_dev.runs(key)) for key in ("1-12", "13-112")}
    command = ("dagster", "job", "backfill", "-w", "workspace.yaml", "-j", "extraction_job", "--noprompt")
    dagster_dev.run(*command, "--partitions", ",".join(before))
    for key, number in before.items():
        wait_for_successes(dagster_dev, key, number + 1)


def wait_for_successes(dagster_dev, key, number):
    dagster_dev.wait(
        lambda: dagster_dev.runs(key) == [SUCCESS] * number, seconds=180, what=f"{number} runs of {key} have succeeded"
    )


@pytest.mark.browser
def test_the_lineage_reads_from_the_table_to_the_points(dagster_dev):
    with dagster_dev.page("asset-groups") as page:
        boxes = [page.locator("foreignObject").filter(has_text=name).first for name in ("source_table", *ALL_THREE)]
        for box in boxes:
            box.wait_for()
        lefts = [box.bounding_box()["x"] for box in boxes]
        assert lefts == sorted(lefts)
        assert len(set(lefts)) == 4


@pytest.mark.browser
def test_the_partitions_show_what_is_covered_and_what_failed_in_a_range(dagster_dev):
    with dagster_dev.page("assets/video_frames?view=partitions&partition=13-112") as page:
        for key in ("1-12", "13-112", "113-208"):
            page.get_by_text(key, exact=True).first.wait_for()
        page.get_by_text("Materialized", exact=True).first.wait_for()
        table = page.get_by_role("table").filter(has_text="VideoOpenError").last
        table.wait_for()
        cells = [cell.inner_text() for cell in table.get_by_role("cell").all()]
        assert cells[:4] == ["108", "parked", "1", "VideoOpenError"]  # since an earlier run


@pytest.mark.browser
def test_a_materialization_shows_numbers_and_thumbnails(dagster_dev):
    with dagster_dev.page("assets/video_frames?view=partitions&partition=113-208") as page:
        for name in ("frames_per_second", "cpu_seconds_decode", "bytes"):
            page.get_by_text(name, exact=True).first.wait_for()
        page.get_by_text("[Show Markdown]").first.click()
        pictures = page.get_by_role("dialog").locator("img")
        pictures.first.wait_for()
        sizes = pictures.evaluate_all("images => images.map(image => [image.complete, image.naturalWidth > 20])")
        assert sizes == [[True, True]] * 8


@pytest.mark.browser
def test_every_thumbnail_of_a_run_is_drawn_none_is_fetched_and_its_failures_are_a_table(dagster_dev):
    before = len(dagster_dev.runs("1-12"))
    dagster_dev.launch("1-12", force=True)  # the broken video is tried again, and fails
    wait_for_successes(dagster_dev, "1-12", before + 1)
    fetched = []
    with dagster_dev.page("assets/video_frames?view=partitions&partition=1-12", fetched) as page:
        table = page.locator("table", has_text="VideoOpenError").last
        table.wait_for()
        header, row = (line.split("\t") for line in table.inner_text().splitlines()[:2])
        page.get_by_text("[Show Markdown]").first.click()
        page.locator(".dagster-markdown img").first.wait_for()
        pictures = page.evaluate(PICTURES)
    assert header == ["record", "stage", "type", "message"]
    assert row[:3] == ["9", "decode", "VideoOpenError"]
    assert [int(alt.partition(" at ")[0]) for alt, _, _ in pictures] == [*range(1, 9), 10, 11, 12]
    assert pictures[0] == ["1 at 3.0 s", 128, 72]
    assert min(min(width, height) for _, width, height in pictures) > 20
    assert not [address for address in fetched if not address.startswith((dagster_dev.url, "data:"))]


@pytest.mark.browser
def test_the_checks_say_that_the_points_are_right(dagster_dev):
    with dagster_dev.page("assets/qdrant_points?view=checks&checkDetail=points_verified") as page:
        page.get_by_text("This is a blocking asset check").first.wait_for()
        page.get_by_text("Passed", exact=True).first.wait_for()


@pytest.mark.parametrize("job", ["extraction_job", "embedding_job", "indexing_job"])
def test_what_the_launchpad_fills_in_is_accepted_by_each_job(dagster_dev, job):
    filled_in = dagster_dev.ask(FILLED_IN)["runConfigSchemaOrError"]["rootDefaultYaml"]
    assert "force: false" in filled_in
    checked = dagster_dev.ask(ACCEPTED, job=job, config=filled_in)["isPipelineConfigValid"]
    assert checked == {"__typename": "PipelineConfigValidationValid"}


@pytest.mark.browser
def test_the_launchpad_opens_and_offers_the_options_of_a_run(dagster_dev):
    with dagster_dev.page("locations/extraction_dagster/jobs/extraction_job") as page:
        page.get_by_role("button", name="Materialize").first.locator("xpath=following::button[1]").click()
        page.get_by_text("Open launchpad").click()
        page.get_by_role("dialog").get_by_text("force").first.wait_for()


@pytest.mark.browser
def test_the_sensors_page_shows_its_cursor(dagster_dev):
    with dagster_dev.page("locations/extraction_dagster/sensors/extraction_sensor") as page:
        page.get_by_text('"last_processed_id": 208').first.wait_for()
        page.get_by_text("0 runs requested").first.wait_for()


def test_a_backfill_of_the_command_is_worked_off_by_the_daemon_and_its_progress_shown(dagster_dev):
    before = {key: len(dagster_dev.runs(key)) for key in ("13-112", "113-208")}
    said = dagster_dev.run("extraction", "backfill", "13-208", "--wait")
    assert (
        "Backfill of 13-208, video_frames, frame_embeddings, qdrant_points: 2 ranges, 2 of them there already" in said
    )
    assert " is done: 2 ranges." in said
    assert {key: len(dagster_dev.runs(key)) - number for key, number in before.items()} == {"13-112": 1, "113-208": 1}


@pytest.mark.browser
def test_two_ranges_are_backfilled_from_the_browser_and_turn_green(dagster_dev):
    ranges = ("201-204", "205-208")
    for key in ranges:  # ranges that nobody has materialized
        assert dagster_dev.ask(ADD_RANGE, key=key)["addDynamicPartition"]["__typename"] == "AddDynamicPartitionSuccess"
    check_that_it_shows(dagster_dev, "assets/qdrant_points?view=partitions", *ranges, "Missing (2)")
    with dagster_dev.page("locations/extraction_dagster/jobs/extraction_job") as page:
        page.get_by_role("button", name="Materialize").first.click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_text("Select a partition or create one").click()
        for key in ranges:
            page.get_by_role("menuitem").filter(has_text=key).get_by_text(key, exact=True).first.click()
        page.keyboard.press("Escape")
        dialog.get_by_role("button", name="Launch backfill").click()
        page.get_by_text("Launch runs to materialize").wait_for(state="hidden")
    for key in ranges:
        wait_for_successes(dagster_dev, key, 1)
    dagster_dev.wait(
        lambda: newest_backfill(dagster_dev)["status"] == "COMPLETED_SUCCESS", seconds=120, what="the backfill is over"
    )
    check_that_it_shows(
        dagster_dev, f"runs/b/{newest_backfill(dagster_dev)['id']}", "2 partitions", "100% completed", "Succeeded"
    )
    for key in ranges:
        path = f"assets/qdrant_points?view=partitions&partition={key}"
        check_that_it_shows(dagster_dev, path, "Materialized", "Missing (0)")


def newest_backfill(dagster_dev):
    (backfill,) = dagster_dev.ask(NEWEST_BACKFILL)["partitionBackfillsOrError"]["results"]
    return backfill


def check_that_it_shows(dagster_dev, path, *words):
    """Each of the words stands on the page, in time; says what stands there when one does not."""
    from playwright.sync_api import Error  # noqa: PLC0415 - lazy: not every test needs it

    with dagster_dev.page(path) as page:
        for text in words:
            try:
                page.get_by_text(text, exact=True).first.wait_for()
            except Error:
                pytest.fail(f"{path} never showed {text!r}; it shows\n{page.locator('body').inner_text()}")


@pytest.mark.browser
def test_a_terminated_run_leaves_what_is_done_and_its_range_goes_on(dagster_dev):
    dagster_dev.rows(COPIES)  # 80 further videos: work for a while
    (key,) = dagster_dev.wait(
        lambda: [key for key in partitions(dagster_dev) if key.startswith("209-")], seconds=60, what="a range was cut"
    )
    begun = "SELECT count(*) FROM insta_content WHERE id >= 300 AND is_extracted"
    dagster_dev.wait(lambda: dagster_dev.rows(begun)[0][0] > 0, seconds=90, what="its run has marked a row")
    (run,) = dagster_dev.ask(NEWEST_RUN)["runsOrError"]["results"]
    with dagster_dev.page(f"runs/{run['runId']}") as page:
        page.get_by_role("button", name="Terminate").click()
        page.get_by_role("dialog").get_by_role("button", name="Terminate").click()
        page.get_by_role("dialog").get_by_text("1 run").first.wait_for()
    dagster_dev.wait(lambda: dagster_dev.runs(key)[-1][0] == "CANCELED", seconds=60, what="the run was terminated")
    check_that_it_shows(dagster_dev, f"runs/{run['runId']}", "Canceled")
    left = "SELECT count(*) FROM insta_content WHERE id >= 300 AND NOT is_embedded"
    dagster_dev.wait(lambda: dagster_dev.rows(left) == [(0,)], seconds=240, what="every row is done")
    dagster_dev.wait(lambda: dagster_dev.runs(key)[0] == SUCCESS, seconds=60, what="the next run has succeeded")
    done = dagster_dev.rows("SELECT state, count(*) FROM extraction_ledger WHERE record_id >= 300 GROUP BY 1")
    assert done == [("done", 80)]
    check_that_it_shows(dagster_dev, f"assets/qdrant_points?view=partitions&partition={key}", key, "Materialized")


def partitions(dagster_dev):
    query = """{ assetNodeOrError(assetKey: {path: ["qdrant_points"]}) { ... on AssetNode { partitionKeys } } }"""
    return dagster_dev.ask(query)["assetNodeOrError"]["partitionKeys"]
