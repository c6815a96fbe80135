"""What a release leaves behind."""

from tests.e2e.cluster import Release, submit, view


def test_what_was_accepted_survives_the_release(release: Release) -> None:
    with release.api() as api:
        task_id = submit(api, task="sample.echo", args=["hello"], countdown=31_536_000)
    kept = release.secrets()

    release.uninstall()

    left = "deployments,statefulsets,jobs,services,configmaps,serviceaccounts,secrets,persistentvolumeclaims"
    by_default = {("ConfigMap", "kube-root-ca.crt"), ("ServiceAccount", "default")}
    assert {(one["kind"], one["metadata"]["name"]) for one in release.get(left)} - by_default == {
        ("PersistentVolumeClaim", "data-tq-postgresql-0"),
        ("PersistentVolumeClaim", "data-tq-redis-0"),
        ("Secret", "tq-postgresql"),
        ("Secret", "tq-redis"),
        ("Secret", "tq-taskqueue"),
    }

    release.install()
    assert release.secrets() == kept
    with release.api() as api:
        assert view(api, task_id)["status"] == "PENDING"
