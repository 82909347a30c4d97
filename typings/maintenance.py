"""Looking after the database."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import assert_type

from moai_flow.memory import (
    CheckReport,
    CleanedTable,
    CleanupReport,
    CorruptDataError,
    ForeignTime,
    KeptRows,
    RetentionPolicy,
    SwarmDB,
    TableFault,
    UnlistedValue,
)


def care(db: SwarmDB) -> None:
    assert_type(db.db_path, Path)
    assert_type(db.schema_version, str)
    assert_type(db.size_bytes(), int)
    assert_type(db.cleanup_old_events(), int)
    db.cleanup_old_events(days=90)
    assert_type(db.vacuum(), None)
    assert_type(db.backup("copy.db"), Path)
    db.backup(Path("copy.db"), overwrite=True)


def retention(db: SwarmDB) -> None:
    SwarmDB(retention=RetentionPolicy(events=timedelta(days=90), agents=timedelta(days=7), memory=None))
    policy = assert_type(db.retention, RetentionPolicy)
    assert_type(policy.events, timedelta | None)
    assert_type(policy.is_off, bool)
    assert_type(RetentionPolicy.of_days(7), RetentionPolicy)
    assert_type(RetentionPolicy.keep_all(), RetentionPolicy)
    assert_type(db.last_cleanup, datetime | None)
    done = assert_type(db.cleanup(30), CleanupReport)
    db.cleanup(days=30, dry_run=True)
    db.cleanup(policy=policy)
    assert_type((done.dry_run, done.rows), tuple[bool, int])
    assert_type(done.tables, tuple[CleanedTable, ...])
    for table in done.tables:
        assert_type((table.table, table.rows, table.before), tuple[str, int, datetime | None])


def report(db: SwarmDB) -> None:
    found = assert_type(db.check(), CheckReport)
    db.check(quarantine=True)
    assert_type(found.ok, bool)
    assert_type(found.sqlite_version, str)
    assert_type(found.has_wal_reset_bug, bool)
    assert_type(found.integrity, tuple[str, ...])
    assert_type(found.undecodable, tuple[CorruptDataError, ...])
    assert_type(found.unlisted, tuple[UnlistedValue, ...])
    assert_type(found.foreign_times, tuple[ForeignTime, ...])
    assert_type(found.quarantined, int)
    assert_type(found.tables, tuple[TableFault, ...])
    assert_type(found.kept, tuple[KeptRows, ...])
    assert_type(found.wal_bytes, int | None)
    assert_type(found.advice, tuple[str, ...])
    for word in found.unlisted:
        assert_type((word.table, word.column, word.value, word.rows), tuple[str, str, str, int])
    for fault in found.tables:
        assert_type((fault.table, fault.reason), tuple[str, str])
    for kept in found.kept:
        assert_type((kept.table, kept.reason, kept.rows), tuple[str, str, int])
    for times in found.foreign_times:
        assert_type((times.table, times.column, times.rows), tuple[str, str, int])


def mistakes(db: SwarmDB) -> None:
    db.cleanup_old_events("30")  # type: ignore[arg-type]
    db.cleanup_old_events(days=0.5)  # type: ignore[arg-type]
    db.cleanup("30")  # type: ignore[arg-type]
    db.cleanup(30, RetentionPolicy())  # type: ignore[call-arg]
    SwarmDB(retention=30)  # type: ignore[arg-type]
    RetentionPolicy(events=30)  # type: ignore[arg-type]
    RetentionPolicy(event=timedelta(days=30))  # type: ignore[call-arg]
    db.retention = RetentionPolicy()  # type: ignore[misc]
    db.backup()  # type: ignore[call-arg]
    db.backup("copy.db", True)  # type: ignore[call-arg]  # noqa: FBT003
    db.check(True)  # type: ignore[call-arg]  # noqa: FBT003
    db.schema_version = "3.0.0"  # type: ignore[misc]
    db.check().ok = True  # type: ignore[misc]
    db.check().kept[0].rows = 0  # type: ignore[misc]
    db.check().advice = ()  # type: ignore[misc]
    db.check().advice.append("")  # type: ignore[attr-defined]
