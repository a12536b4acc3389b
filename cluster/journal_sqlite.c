/* The file of a durable journal.
 *
 * synchronous=FULL: every commit is synced to the disk (once, in WAL mode), because what journal_accept() has promised must also
 * outlive a power cut; NORMAL would sync only at checkpoints, minutes apart. Commits are few, being collected, so this costs at
 * most 1000 / commit_ms syncs a second and one wait per accepted request. A process that is killed loses nothing either way.
 *
 * Tokens are rows (request, sequence, first) in the order in which replay reads them. Space of forgotten requests goes back to
 * the system by incremental vacuum, a little after a commit, so that the file does not keep its largest size for ever. */
#include "cluster/journal_store.h"

#include "proto/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    APPLICATION_ID = 0x434e564a, /* "CNVJ" */
    SCHEMA_VERSION = 1,
    BUSY_MS = 2000,
    TIDY_PAGES = 1024, /* free pages worth giving back, and how many at once */
    LAUNCHES_KEPT = 1000,
};

static const char schema[] =
    "CREATE TABLE request(number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, launch INTEGER NOT NULL, spec "
    "BLOB NOT NULL);"
    "CREATE TABLE tokens(request INTEGER NOT NULL, sequence INTEGER NOT NULL, first INTEGER NOT NULL,"
    " n INTEGER NOT NULL, launch INTEGER NOT NULL, records BLOB NOT NULL,"
    " PRIMARY KEY(request, sequence, first)) WITHOUT ROWID;"
    "CREATE TABLE finish(request INTEGER NOT NULL, sequence INTEGER NOT NULL, how BLOB NOT NULL,"
    " PRIMARY KEY(request, sequence)) WITHOUT ROWID;"
    "CREATE TABLE launch(number INTEGER PRIMARY KEY, plan_epoch INTEGER NOT NULL, isa TEXT NOT NULL,"
    " combine TEXT NOT NULL);"
    "CREATE TABLE lease(one INTEGER PRIMARY KEY CHECK(one = 1), host TEXT, boot TEXT, space TEXT,"
    " pid INTEGER, started INTEGER, token TEXT, beat INTEGER, time INTEGER);";

enum {
    SQL_BEGIN,
    SQL_BEAT,
    SQL_COMMIT,
    SQL_ROLLBACK,
    SQL_ACCEPT,
    SQL_TOKENS,
    SQL_FINISH,
    SQL_FORGET_TOKENS,
    SQL_FORGET_FINISH,
    SQL_FORGET,
    SQL_CUT_TOKENS,
    SQL_CUT_FINISH,
    SQL_LAUNCH,
    SQL_LAUNCH_OLD,
    SQL_FREE_PAGES,
    SQL_VACUUM,
    N_SQL
};

static const char *const sql_texts[N_SQL] = {
    [SQL_BEGIN] = "BEGIN IMMEDIATE",
    [SQL_BEAT] = "UPDATE lease SET beat = beat + 1, time = ?1 WHERE token = ?2",
    [SQL_COMMIT] = "COMMIT",
    [SQL_ROLLBACK] = "ROLLBACK",
    [SQL_ACCEPT] = "INSERT INTO request(number, id, launch, spec) VALUES(?1, ?2, ?3, ?4)",
    [SQL_TOKENS] = "INSERT OR REPLACE INTO tokens(request, sequence, first, n, launch, records) VALUES(?1, ?2, ?3, ?4, ?5, ?6)",
    [SQL_FINISH] = "INSERT OR REPLACE INTO finish(request, sequence, how) VALUES(?1, ?2, ?3)",
    [SQL_FORGET_TOKENS] = "DELETE FROM tokens WHERE request = ?1",
    [SQL_FORGET_FINISH] = "DELETE FROM finish WHERE request = ?1",
    [SQL_FORGET] = "DELETE FROM request WHERE number = ?1",
    [SQL_CUT_TOKENS] = "DELETE FROM tokens WHERE request = ?1 AND sequence = ?2 AND first >= ?3",
    [SQL_CUT_FINISH] = "DELETE FROM finish WHERE request = ?1 AND sequence = ?2",
    [SQL_LAUNCH] = "INSERT OR REPLACE INTO launch(number, plan_epoch, isa, combine) VALUES(?1, ?2, ?3, ?4)",
    [SQL_LAUNCH_OLD] = "DELETE FROM launch WHERE number < ?1",
    [SQL_FREE_PAGES] = "PRAGMA freelist_count",
    [SQL_VACUUM] = "PRAGMA incremental_vacuum(1024)", /* TIDY_PAGES */
};

struct journal_store {
    sqlite3 *db;
    char *path;
    sqlite3_stmt *sql[N_SQL];
    journal_holder self;
    bool lost; /* another holder has the lease */
};

/* ---- SQLite's words ---- */

static status fail_db(sqlite3 *db, const char *path, const char *what)
{
    int code = db ? sqlite3_errcode(db) : SQLITE_NOMEM, system = db ? sqlite3_system_errno(db) : 0;
    switch (code & 0xff) {
    case SQLITE_NOMEM:
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for the journal", path);
    case SQLITE_FULL:
        return status_fail(STATUS_IO, "%s: %s: the disk is full", path, what);
    case SQLITE_NOTADB:
        return status_fail(STATUS_BAD_INPUT, "%s: not a journal of Convoke (%s)", path, sqlite3_errmsg(db));
    case SQLITE_CORRUPT:
        return status_fail(STATUS_BAD_INPUT, "%s: damaged (%s); move it away to begin with an empty one", path,
                           sqlite3_errmsg(db));
    case SQLITE_BUSY:
        return status_fail(STATUS_IO, "%s: %s: another program has locked the file", path, what);
    default:
        return status_fail(STATUS_IO, "%s: %s: %s%s%s", path, what, sqlite3_errmsg(db), system ? ", " : "",
                           system ? strerror(system) : "");
    }
}

static status run_text(sqlite3 *db, const char *path, const char *text, const char *what)
{
    return sqlite3_exec(db, text, NULL, NULL, NULL) == SQLITE_OK ? STATUS_OK : fail_db(db, path, what);
}

/* The first column of the first row, as text in `out` ("" when there is no row). */
static status ask(sqlite3 *db, const char *path, const char *text, char *out, int size)
{
    sqlite3_stmt *q = NULL;
    out[0] = '\0';
    int rc = sqlite3_prepare_v2(db, text, -1, &q, NULL);
    if (rc == SQLITE_OK)
        rc = sqlite3_step(q);
    if (rc == SQLITE_ROW) {
        const unsigned char *found = sqlite3_column_text(q, 0);
        snprintf(out, (size_t)size, "%s", found ? (const char *)found : "");
    }
    status st = rc == SQLITE_ROW || rc == SQLITE_DONE ? STATUS_OK : fail_db(db, path, "cannot be read");
    sqlite3_finalize(q);
    return st;
}

static status ask_number(sqlite3 *db, const char *path, const char *text, int64_t *out)
{
    char found[32];
    TRY(ask(db, path, text, found, sizeof found));
    *out = strtoll(found, NULL, 10);
    return STATUS_OK;
}

static int step(sqlite3_stmt *q)
{
    int rc;
    while ((rc = sqlite3_step(q)) == SQLITE_ROW)
        ;
    sqlite3_reset(q);
    return rc;
}

/* ---- opening: whose file is it, and is it whole ---- */

/* Made by us, so that only its owner reads people's prompts; SQLite gives its two side files the same rights. */
static status touch(const char *path)
{
    struct stat found;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK, 0600);
    if (fd < 0 || fstat(fd, &found) != 0) {
        status st = status_fail(STATUS_IO, "%s: the journal cannot be opened (%s)", path, strerror(errno));
        if (fd >= 0)
            close(fd);
        return st;
    }
    close(fd);
    return S_ISREG(found.st_mode) ? STATUS_OK : status_fail(STATUS_BAD_INPUT, "%s: the journal must be a file", path);
}

/* Looks, and writes nothing: a mistaken path must not change another program's database. */
static status check_kind(sqlite3 *db, const char *path, bool *is_new)
{
    int64_t application = 0, version = 0, tables = 0;
    TRY(ask_number(db, path, "PRAGMA application_id", &application));
    TRY(ask_number(db, path, "PRAGMA user_version", &version));
    TRY(ask_number(db, path, "SELECT count(*) FROM sqlite_master", &tables));
    *is_new = application == 0 && version == 0 && tables == 0;
    if (*is_new)
        return STATUS_OK;
    if (application != APPLICATION_ID)
        return status_fail(STATUS_BAD_INPUT, "%s: a database of another program, not a journal of Convoke", path);
    if (version != SCHEMA_VERSION)
        return status_fail(STATUS_UNSUPPORTED, "%s: a journal of version %" PRId64 "; this program reads version %d", path,
                           version, SCHEMA_VERSION);
    return STATUS_OK;
}

static status settle_modes(sqlite3 *db, const char *path, bool is_new)
{
    char mode[32];
    if (is_new) /* only possible before the first table */
        TRY(run_text(db, path, "PRAGMA auto_vacuum = INCREMENTAL", "cannot be set up"));
    TRY(ask(db, path, "PRAGMA journal_mode = WAL", mode, sizeof mode));
    if (strcmp(mode, "wal") != 0)
        return status_fail(STATUS_UNSUPPORTED,
                           "%s: this file system does not do what a journal needs (shared memory beside the file)", path);
    return run_text(db, path, "PRAGMA synchronous = FULL; PRAGMA journal_size_limit = 16777216; PRAGMA cell_size_check = ON",
                    "cannot be set up");
}

static status check_whole(sqlite3 *db, const char *path)
{
    char verdict[300];
    TRY(ask(db, path, "PRAGMA quick_check(1)", verdict, sizeof verdict));
    if (strcmp(verdict, "ok") != 0)
        return status_fail(STATUS_BAD_INPUT, "%s: damaged (%s); move it away to begin with an empty one", path, verdict);
    return STATUS_OK;
}

/* Again inside a transaction: another coordinator may have been quicker. */
static status make_tables(sqlite3 *db, const char *path)
{
    bool is_new = false;
    char marks[100];
    snprintf(marks, sizeof marks, "PRAGMA application_id = %d; PRAGMA user_version = %d;", APPLICATION_ID, SCHEMA_VERSION);
    TRY(run_text(db, path, "BEGIN IMMEDIATE", "cannot be set up"));
    status st = check_kind(db, path, &is_new);
    if (st == STATUS_OK && is_new)
        st = run_text(db, path, schema, "cannot be set up");
    if (st == STATUS_OK && is_new)
        st = run_text(db, path, marks, "cannot be set up");
    if (st == STATUS_OK)
        return run_text(db, path, "COMMIT", "cannot be set up");
    sqlite3_exec(db, "ROLLBACK", NULL, NULL, NULL);
    return st;
}

static status connect_file(const char *path, sqlite3 **out)
{
    sqlite3 *db = NULL;
    if (sqlite3_open_v2(path, &db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX, NULL) != SQLITE_OK) {
        status st = fail_db(db, path, "the journal cannot be opened");
        sqlite3_close(db);
        return st;
    }
    sqlite3_busy_timeout(db, BUSY_MS);
    *out = db;
    return STATUS_OK;
}

/* ---- the lease ---- */

typedef struct {
    bool there;
    journal_holder holder;
    int64_t beat;
} lease_row;

static void copy_text(char *out, size_t size, sqlite3_stmt *q, int column)
{
    const unsigned char *text = sqlite3_column_text(q, column);
    snprintf(out, size, "%s", text ? (const char *)text : "");
}

static status read_lease(journal_store *s, lease_row *out)
{
    sqlite3_stmt *q = NULL;
    *out = (lease_row){0};
    int rc = sqlite3_prepare_v2(s->db, "SELECT host, boot, space, pid, started, token, beat FROM lease", -1, &q, NULL);
    if (rc == SQLITE_OK)
        rc = sqlite3_step(q);
    if (rc == SQLITE_ROW) {
        journal_holder *h = &out->holder;
        out->there = true;
        copy_text(h->host, sizeof h->host, q, 0);
        copy_text(h->boot, sizeof h->boot, q, 1);
        copy_text(h->space, sizeof h->space, q, 2);
        h->pid = sqlite3_column_int64(q, 3);
        h->started = sqlite3_column_int64(q, 4);
        copy_text(h->token, sizeof h->token, q, 5);
        out->beat = sqlite3_column_int64(q, 6);
    }
    status st = rc == SQLITE_ROW || rc == SQLITE_DONE ? STATUS_OK : fail_db(s->db, s->path, "the lease cannot be read");
    sqlite3_finalize(q);
    return st;
}

static status write_lease(journal_store *s)
{
    sqlite3_stmt *q = NULL;
    const journal_holder *h = &s->self;
    int rc = sqlite3_prepare_v2(s->db,
                                "INSERT OR REPLACE INTO lease(one, host, boot, space, pid, started, token, beat, time)"
                                " VALUES(1, ?1, ?2, ?3, ?4, ?5, ?6, 0, ?7)",
                                -1, &q, NULL);
    if (rc == SQLITE_OK) {
        sqlite3_bind_text(q, 1, h->host, -1, SQLITE_STATIC);
        sqlite3_bind_text(q, 2, h->boot, -1, SQLITE_STATIC);
        sqlite3_bind_text(q, 3, h->space, -1, SQLITE_STATIC);
        sqlite3_bind_int64(q, 4, h->pid);
        sqlite3_bind_int64(q, 5, h->started);
        sqlite3_bind_text(q, 6, h->token, -1, SQLITE_STATIC);
        sqlite3_bind_int64(q, 7, (int64_t)time(NULL));
        rc = sqlite3_step(q);
    }
    status st = rc == SQLITE_DONE ? STATUS_OK : fail_db(s->db, s->path, "the lease cannot be written");
    sqlite3_finalize(q);
    return st;
}

/* One look: takes the lease when nobody has it, or when it is still as `abandoned` says. */
static status try_lease(journal_store *s, const lease_row *abandoned, lease_row *found, bool *taken)
{
    TRY(run_text(s->db, s->path, "BEGIN IMMEDIATE", "the lease cannot be taken"));
    status st = read_lease(s, found);
    holder_state state = found->there ? journal_holder_look(&found->holder, &s->self) : HOLDER_DEAD;
    bool still = abandoned && found->beat == abandoned->beat && strcmp(found->holder.token, abandoned->holder.token) == 0;
    *taken = false;
    if (st == STATUS_OK && (state == HOLDER_DEAD || (state == HOLDER_OUT_OF_SIGHT && still))) {
        st = write_lease(s);
        if (st == STATUS_OK)
            st = run_text(s->db, s->path, "COMMIT", "the lease cannot be taken");
        *taken = st == STATUS_OK;
    } else if (st == STATUS_OK && state == HOLDER_ALIVE) {
        st = status_fail(STATUS_IO, "%s: in use by another coordinator (process %" PRId64 " on this machine)", s->path,
                         found->holder.pid);
    }
    if (!*taken)
        sqlite3_exec(s->db, "ROLLBACK", NULL, NULL, NULL);
    return st;
}

static status take_lease(journal_store *s, double patience)
{
    lease_row first, now;
    bool taken = false;
    TRY(try_lease(s, NULL, &first, &taken));
    for (double end = clock_seconds() + patience; !taken && clock_seconds() < end;) {
        nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
        TRY(read_lease(s, &now));
        if (!now.there)
            break;
        if (now.beat != first.beat || strcmp(now.holder.token, first.holder.token) != 0)
            return status_fail(STATUS_IO, "%s: in use by another coordinator (process %" PRId64 " on %s)", s->path,
                               now.holder.pid, now.holder.host);
    }
    if (!taken)
        TRY(try_lease(s, &first, &now, &taken));
    return taken ? STATUS_OK
                 : status_fail(STATUS_IO, "%s: in use by another coordinator (process %" PRId64 " on %s)", s->path,
                               now.holder.pid, now.holder.host);
}

/* ---- opened and closed ---- */

static status prepare_all(journal_store *s)
{
    for (int i = 0; i < N_SQL; i++)
        if (sqlite3_prepare_v3(s->db, sql_texts[i], -1, SQLITE_PREPARE_PERSISTENT, &s->sql[i], NULL) != SQLITE_OK)
            return fail_db(s->db, s->path, "cannot be read");
    return STATUS_OK;
}

static status open_store(journal_store *s, double patience)
{
    bool is_new = false;
    TRY(touch(s->path));
    TRY(connect_file(s->path, &s->db));
    TRY(check_kind(s->db, s->path, &is_new));
    TRY(settle_modes(s->db, s->path, is_new));
    if (is_new)
        TRY(make_tables(s->db, s->path));
    TRY(take_lease(s, patience));
    status st = check_whole(s->db, s->path);
    return st == STATUS_OK ? prepare_all(s) : st;
}

status journal_store_open(const char *path, const journal_holder *self, double patience, journal_store **out)
{
    journal_store *s = calloc(1, sizeof *s);
    if (s)
        s->path = strdup(path);
    if (!s || !s->path) {
        free(s);
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for the journal", path);
    }
    s->self = *self;
    status st = open_store(s, patience);
    if (st == STATUS_OK)
        *out = s;
    else
        journal_store_close(s);
    return st;
}

void journal_store_close(journal_store *s)
{
    if (!s)
        return;
    for (int i = 0; i < N_SQL; i++)
        sqlite3_finalize(s->sql[i]);
    char give_back[100];
    snprintf(give_back, sizeof give_back, "DELETE FROM lease WHERE token = '%s'", s->self.token);
    if (s->db)
        sqlite3_exec(s->db, give_back, NULL, NULL, NULL); /* where it fails, the next one finds this process dead */
    sqlite3_close(s->db);
    free(s->path);
    free(s);
}

/* ---- writing ---- */

static status fail_write(journal_store *s)
{
    return fail_db(s->db, s->path, "cannot be written");
}

static status run(journal_store *s, int which)
{
    return step(s->sql[which]) == SQLITE_DONE ? STATUS_OK : fail_write(s);
}

status journal_store_begin(journal_store *s)
{
    if (!s->lost) {
        TRY(run(s, SQL_BEGIN));
        sqlite3_bind_int64(s->sql[SQL_BEAT], 1, (int64_t)time(NULL));
        sqlite3_bind_text(s->sql[SQL_BEAT], 2, s->self.token, -1, SQLITE_STATIC);
        TRY(run(s, SQL_BEAT));
        s->lost = sqlite3_changes(s->db) != 1;
    }
    return s->lost ? status_fail(STATUS_IO, "%s: another coordinator has taken it over; nothing more is written", s->path)
                   : STATUS_OK;
}

static void bind_ints(sqlite3_stmt *q, int n, const int64_t *values)
{
    for (int i = 0; i < n; i++)
        sqlite3_bind_int64(q, i + 1, values[i]);
}

/* The data is read within the call: no copy. A pointer that is NULL would be stored as NULL, not as an empty blob. */
static status run_blob(journal_store *s, int which, int column, const journal_op *op)
{
    sqlite3_bind_blob64(s->sql[which], column, op->data ? op->data : "", op->size, SQLITE_STATIC);
    int rc = step(s->sql[which]);
    if ((rc & 0xff) == SQLITE_CONSTRAINT)
        return status_fail(STATUS_BAD_INPUT, "%s: a request with this id is there already", s->path);
    return rc == SQLITE_DONE ? STATUS_OK : fail_write(s);
}

static status run_numbers(journal_store *s, int which, int n, const int64_t *values)
{
    bind_ints(s->sql[which], n, values);
    return run(s, which);
}

status journal_store_apply(journal_store *s, const journal_op *op)
{
    const int64_t key[] = {op->request, op->sequence, op->first, op->n, (int64_t)op->launch};
    switch (op->kind) {
    case JOURNAL_ACCEPT:
        sqlite3_bind_int64(s->sql[SQL_ACCEPT], 1, op->request);
        sqlite3_bind_text(s->sql[SQL_ACCEPT], 2, op->id, -1, SQLITE_STATIC);
        sqlite3_bind_int64(s->sql[SQL_ACCEPT], 3, (int64_t)op->launch);
        return run_blob(s, SQL_ACCEPT, 4, op);
    case JOURNAL_TOKENS:
        bind_ints(s->sql[SQL_TOKENS], 5, key);
        return run_blob(s, SQL_TOKENS, 6, op);
    case JOURNAL_FINISH:
        bind_ints(s->sql[SQL_FINISH], 2, key);
        return run_blob(s, SQL_FINISH, 3, op);
    case JOURNAL_FORGET:
        TRY(run_numbers(s, SQL_FORGET_TOKENS, 1, key));
        TRY(run_numbers(s, SQL_FORGET_FINISH, 1, key));
        return run_numbers(s, SQL_FORGET, 1, key);
    case JOURNAL_CUT:
        TRY(run_numbers(s, SQL_CUT_TOKENS, 3, key));
        return run_numbers(s, SQL_CUT_FINISH, 2, key);
    }
    return STATUS_OK;
}

status journal_store_launch(journal_store *s, const journal_launch *launch)
{
    sqlite3_stmt *q = s->sql[SQL_LAUNCH];
    sqlite3_bind_int64(q, 1, (int64_t)launch->launch);
    sqlite3_bind_int64(q, 2, (int64_t)launch->plan_epoch);
    sqlite3_bind_text(q, 3, launch->isa, -1, SQLITE_STATIC);
    sqlite3_bind_text(q, 4, launch->combine, -1, SQLITE_STATIC);
    TRY(run(s, SQL_LAUNCH));
    const int64_t oldest = (int64_t)launch->launch - LAUNCHES_KEPT;
    return run_numbers(s, SQL_LAUNCH_OLD, 1, &oldest);
}

status journal_store_commit(journal_store *s)
{
    return run(s, SQL_COMMIT);
}

void journal_store_rollback(journal_store *s)
{
    if (!sqlite3_get_autocommit(s->db)) /* after some failures SQLite has rolled back by itself */
        step(s->sql[SQL_ROLLBACK]);
}

void journal_store_tidy(journal_store *s)
{
    sqlite3_stmt *q = s->sql[SQL_FREE_PAGES];
    int64_t free_pages = sqlite3_step(q) == SQLITE_ROW ? sqlite3_column_int64(q, 0) : 0;
    sqlite3_reset(q);
    if (free_pages >= TIDY_PAGES && !s->lost)
        step(s->sql[SQL_VACUUM]); /* no harm when it fails: the next call tries again */
}

/* ---- reading ---- */

status journal_store_last_launch(journal_store *s, journal_launch *out)
{
    sqlite3_stmt *q = NULL;
    *out = (journal_launch){0};
    int rc = sqlite3_prepare_v2(s->db, "SELECT number, plan_epoch, isa, combine FROM launch ORDER BY number DESC LIMIT 1", -1, &q,
                                NULL);
    if (rc == SQLITE_OK)
        rc = sqlite3_step(q);
    if (rc == SQLITE_ROW) {
        out->launch = (uint64_t)sqlite3_column_int64(q, 0);
        out->plan_epoch = (uint64_t)sqlite3_column_int64(q, 1);
        copy_text(out->isa, sizeof out->isa, q, 2);
        copy_text(out->combine, sizeof out->combine, q, 3);
    }
    status st = rc == SQLITE_ROW || rc == SQLITE_DONE ? STATUS_OK : fail_db(s->db, s->path, "cannot be read");
    sqlite3_finalize(q);
    return st;
}

status journal_store_ids(journal_store *s, status (*visit)(void *arg, int64_t number, const char *id), void *arg)
{
    sqlite3_stmt *q = NULL;
    status st = STATUS_OK;
    int rc = sqlite3_prepare_v2(s->db, "SELECT number, id FROM request ORDER BY number", -1, &q, NULL);
    while (rc == SQLITE_OK && st == STATUS_OK && (rc = sqlite3_step(q)) == SQLITE_ROW) {
        const unsigned char *id = sqlite3_column_text(q, 1);
        st = visit(arg, sqlite3_column_int64(q, 0), id ? (const char *)id : "");
        rc = SQLITE_OK;
    }
    if (st == STATUS_OK && rc != SQLITE_OK && rc != SQLITE_DONE)
        st = fail_db(s->db, s->path, "cannot be read");
    sqlite3_finalize(q);
    return st;
}

typedef struct {
    sqlite3 *db;
    const char *path;
    sqlite3_stmt *requests, *tokens, *finishes;
    const journal_visitor *visitor;
    void *arg, *cut_arg;
    void (*cut)(void *arg, int64_t request, int sequence, int first);
} replay;

/* SQLITE_ROW: *blob is column `column`; SQLITE_DONE: no more. */
static int next_row(sqlite3_stmt *q, int column, const void **blob, size_t *size)
{
    int rc = sqlite3_step(q);
    if (rc == SQLITE_ROW) {
        *blob = sqlite3_column_blob(q, column);
        *size = (size_t)sqlite3_column_bytes(q, column);
    }
    return rc;
}

static status replay_finishes(replay *r, int64_t number, const char *id, const int *torn, int n_torn)
{
    const void *how = NULL;
    size_t size = 0;
    int rc;
    sqlite3_reset(r->finishes);
    sqlite3_bind_int64(r->finishes, 1, number);
    while ((rc = next_row(r->finishes, 1, &how, &size)) == SQLITE_ROW) {
        int sequence = sqlite3_column_int(r->finishes, 0), is_torn = 0;
        for (int i = 0; i < n_torn; i++)
            is_torn |= torn[i] == sequence;
        if (!is_torn)
            TRY(r->visitor->finish(r->arg, id, sequence, how, size));
    }
    return rc == SQLITE_DONE ? STATUS_OK : fail_db(r->db, r->path, "cannot be read");
}

enum { MOST_TORN = 256 };

static status replay_outputs(replay *r, int64_t number, const char *id)
{
    const void *records = NULL;
    size_t size = 0;
    int torn[MOST_TORN], n_torn = 0, sequence = -1, expected = 0, rc;
    bool is_torn = false;
    sqlite3_reset(r->tokens);
    sqlite3_bind_int64(r->tokens, 1, number);
    while ((rc = next_row(r->tokens, 3, &records, &size)) == SQLITE_ROW) {
        int first = sqlite3_column_int(r->tokens, 1), n = sqlite3_column_int(r->tokens, 2);
        if (sqlite3_column_int(r->tokens, 0) != sequence) {
            sequence = sqlite3_column_int(r->tokens, 0);
            expected = 0;
            is_torn = false;
        }
        bool fits = first == expected && n >= 0 && n <= INT32_MAX - first;
        if (!is_torn && !fits) {
            if (n_torn == MOST_TORN)
                return status_fail(STATUS_BAD_INPUT, "%s: damaged (tokens are missing in many sequences of request %s)", r->path,
                                   id);
            torn[n_torn++] = sequence;
            is_torn = true;
            r->cut(r->cut_arg, number, sequence, expected);
        }
        if (is_torn)
            continue;
        expected = first + n;
        TRY(r->visitor->tokens(r->arg, id, sequence, first, n, records, size));
    }
    if (rc != SQLITE_DONE)
        return fail_db(r->db, r->path, "cannot be read");
    return replay_finishes(r, number, id, torn, n_torn);
}

static status replay_requests(replay *r)
{
    const void *spec = NULL;
    size_t size = 0;
    int rc;
    while ((rc = next_row(r->requests, 2, &spec, &size)) == SQLITE_ROW) {
        const char *id = (const char *)sqlite3_column_text(r->requests, 1);
        TRY(r->visitor->request(r->arg, id ? id : "", spec, size));
        TRY(replay_outputs(r, sqlite3_column_int64(r->requests, 0), id ? id : ""));
    }
    return rc == SQLITE_DONE ? STATUS_OK : fail_db(r->db, r->path, "cannot be read");
}

status journal_store_replay(const char *path, const journal_visitor *visitor, void *arg,
                            void (*cut)(void *arg, int64_t request, int sequence, int first), void *cut_arg)
{
    replay r = {.path = path, .visitor = visitor, .arg = arg, .cut = cut, .cut_arg = cut_arg};
    TRY(connect_file(path, &r.db));
    /* one snapshot for all three */
    status st = run_text(r.db, path, "PRAGMA query_only = ON; BEGIN", "cannot be read");
    if (st == STATUS_OK &&
        (sqlite3_prepare_v2(r.db, "SELECT number, id, spec FROM request ORDER BY number", -1, &r.requests, NULL) != SQLITE_OK ||
         sqlite3_prepare_v2(r.db, "SELECT sequence, first, n, records FROM tokens WHERE request = ?1 ORDER BY sequence, first",
                            -1, &r.tokens, NULL) != SQLITE_OK ||
         sqlite3_prepare_v2(r.db, "SELECT sequence, how FROM finish WHERE request = ?1 ORDER BY sequence", -1, &r.finishes,
                            NULL) != SQLITE_OK))
        st = fail_db(r.db, path, "cannot be read");
    if (st == STATUS_OK)
        st = replay_requests(&r);
    sqlite3_finalize(r.requests);
    sqlite3_finalize(r.tokens);
    sqlite3_finalize(r.finishes);
    sqlite3_close(r.db);
    return st;
}
