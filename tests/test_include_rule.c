/* Who may include whom: proto <- placement <- router <- worker, and proto, placement <- cluster. Outside libraries are seen by as
 * few files as can be. Read from the sources themselves, so that the picture in CONTRIBUTING.md stays true. */
#include "tests/support.h"

#include <ctype.h>
#include <dirent.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *folder, *may_include; /* blank-separated, blanks around */
} folder_rules[] = {
    {"proto", " proto "},
    {"placement", " proto placement "},
    {"placement/planner", " proto placement placement/planner "},
    {"router", " proto placement router "},
    {"worker", " proto placement router worker "},
    {"cluster", " proto placement cluster "},
    {"tests", " proto placement placement/planner router worker cluster tests "},
};

static const struct {
    const char *prefix, *folder; /* an outside header, and the only folder that may see it */
    int max_files;
} library_rules[] = {
    {"mpi.h", "router", 2},
    {"cjson/", "proto", 1},
    {"glpk.h", "placement/planner", 1},
    {"nccl.h", "router", 1},
    {"grpc/", "cluster", 2},
    {"sqlite3.h", "cluster", 1},
    {"microhttpd.h", "cluster", 1},
    {"pcre2.h", "cluster", 1},
    {"utf8proc.h", "cluster", 1},
    {"yaml.h", "placement/planner", 1},
    {"zip.h", "placement/planner", 1},
};
enum { N_LIBRARIES = sizeof library_rules / sizeof library_rules[0] };

typedef void visit_include(const char *folder, const char *file, const char *included, bool quoted, void *seen);

/* Calls visit for every #include line of a file. */
static void scan_file(const char *folder, const char *file, visit_include *visit, void *seen)
{
    char path[600], line[1000], name[300];
    snprintf(path, sizeof path, "%s/%s", folder, file);
    FILE *f = fopen(support_source(path), "r");
    assert_non_null(f);
    while (fgets(line, sizeof line, f)) {
        char open;
        if (sscanf(line, " # include %c%299[^\">]", &open, name) == 2)
            visit(folder, path, name, open == '"', seen);
    }
    fclose(f);
}

static bool is_source(const char *name)
{
    const char *dot = strrchr(name, '.');
    return dot && (strcmp(dot, ".c") == 0 || strcmp(dot, ".h") == 0 || strcmp(dot, ".cu") == 0);
}

/* Returns how many files the folder has; a folder that is not there yet has none. */
static int scan_folder(const char *folder, visit_include *visit, void *seen)
{
    int n = 0;
    DIR *dir = opendir(support_source(folder));
    if (!dir)
        return 0;
    for (struct dirent *entry; (entry = readdir(dir));)
        if (is_source(entry->d_name)) {
            scan_file(folder, entry->d_name, visit, seen);
            n++;
        }
    closedir(dir);
    return n;
}

static const char *allowed_for(const char *folder)
{
    for (size_t i = 0; i < sizeof folder_rules / sizeof folder_rules[0]; i++)
        if (strcmp(folder_rules[i].folder, folder) == 0)
            return folder_rules[i].may_include;
    return "";
}

static void check_own_include(const char *folder, const char *file, const char *included, bool quoted, void *seen)
{
    (void)seen;
    if (!quoted)
        return;
    char word[302];
    const char *slash = strrchr(included, '/');
    size_t n = slash ? (size_t)(slash - included) : 0;
    if (!slash)
        fail_msg("%s includes \"%s\": own headers are named from the root, \"folder/name.h\"", file, included);
    snprintf(word, sizeof word, " %.*s ", (int)n, included);
    if (!strstr(allowed_for(folder), word))
        fail_msg("%s includes \"%s\": %s/ may include%sonly", file, included, folder, allowed_for(folder));
}

static void folders_keep_their_order(void **state)
{
    (void)state;
    int n = 0;
    for (size_t i = 0; i < sizeof folder_rules / sizeof folder_rules[0]; i++)
        n += scan_folder(folder_rules[i].folder, check_own_include, NULL);
    assert_true(n > 20); /* it did look at the sources */
}

typedef struct {
    int n_files;
    char last[600]; /* a file that includes several of a library's headers counts once */
} sightings;

static void count_library(const char *folder, const char *file, const char *included, bool quoted, void *seen)
{
    (void)quoted;
    sightings *s = seen;
    for (int i = 0; i < N_LIBRARIES; i++) {
        if (strncmp(included, library_rules[i].prefix, strlen(library_rules[i].prefix)) != 0)
            continue;
        if (strcmp(folder, library_rules[i].folder) != 0)
            fail_msg("%s includes <%s>, which only %s/ may", file, included, library_rules[i].folder);
        if (strcmp(s[i].last, file) != 0)
            s[i].n_files++;
        snprintf(s[i].last, sizeof s[i].last, "%s", file);
    }
}

static void libraries_stay_in_few_files(void **state)
{
    (void)state;
    sightings seen[N_LIBRARIES] = {0};
    for (size_t i = 0; i + 1 < sizeof folder_rules / sizeof folder_rules[0]; i++) /* tests may see all */
        scan_folder(folder_rules[i].folder, count_library, seen);
    for (int i = 0; i < N_LIBRARIES; i++)
        if (seen[i].n_files > library_rules[i].max_files)
            fail_msg("<%s> is included by %d files, at most %d may", library_rules[i].prefix, seen[i].n_files,
                     library_rules[i].max_files);
    assert_int_equal(seen[1].n_files, 1);
}

static void check_guard(const char *folder, const char *file)
{
    char path[600], guard[600], line[1000];
    snprintf(path, sizeof path, "%s/%s", folder, file);
    snprintf(guard, sizeof guard, "#ifndef CONVOKE_%s/%s\n", folder, file);
    for (char *c = guard + 8; *c; c++)
        *c = *c == '/' || *c == '.' ? '_' : (char)toupper((unsigned char)*c);
    FILE *f = fopen(support_source(path), "r");
    assert_non_null(f);
    bool found = false;
    while (!found && fgets(line, sizeof line, f))
        found = strcmp(line, guard) == 0;
    fclose(f);
    if (!found)
        fail_msg("%s: no line \"%.*s\"", path, (int)strlen(guard) - 1, guard);
}

static void headers_are_guarded(void **state)
{
    (void)state;
    for (size_t i = 0; i + 1 < sizeof folder_rules / sizeof folder_rules[0]; i++) { /* tests/ also holds generated tables */
        DIR *dir = opendir(support_source(folder_rules[i].folder));
        if (!dir)
            continue;
        for (struct dirent *entry; (entry = readdir(dir));) {
            size_t n = strlen(entry->d_name);
            if (n > 2 && strcmp(entry->d_name + n - 2, ".h") == 0)
                check_guard(folder_rules[i].folder, entry->d_name);
        }
        closedir(dir);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"a folder includes only those below it", folders_keep_their_order, NULL, NULL, NULL},
        {"an outside library is seen by few files, in one folder", libraries_stay_in_few_files, NULL, NULL, NULL},
        {"a header is guarded by its own path", headers_are_guarded, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
