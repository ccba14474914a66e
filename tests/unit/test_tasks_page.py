"""docs/tasks.md is what the registry and the result files say."""

from scripts import tasks_page


def test_the_page_of_tasks_is_the_one_that_would_be_written_now():
    assert tasks_page.PAGE.read_text(encoding="utf-8") == tasks_page.page()
