/* convoke-plan: statistics, plans, scores, comparisons, simulations, import and export. One subcommand, one function. */
#include "placement/planner/commands.h"

#include <stdio.h>
#include <string.h>

static const struct {
    const char *name, *summary;
    status (*run)(int argc, char **argv);
} commands[] = {
    {"import", "other engines' files into traces, statistics or plans", command_import},
    {"stats", "count which experts traces chose", command_stats},
    {"solve", "make a plan from statistics or a trace", command_solve},
    {"score", "what a plan costs: balance, copies, step time", command_score},
    {"compare", "several plans on one trace, one table, one picture", command_compare},
    {"simulate", "replay a trace under a plan", command_simulate},
    {"diff", "what moves from one plan to another, and when it has paid", command_diff},
    {"export", "a plan or statistics for another engine", command_export},
    {"show", "a plan, statistics, a trace or a topology, for people", command_show},
    {"probe", "measure, under mpirun, what computing and sending cost for a model", command_probe},
};
enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

static void print_help(FILE *f)
{
    fprintf(f, "usage: convoke-plan COMMAND [options]; convoke-plan COMMAND --help says more\n\n"
               "Plans which expert lives on which rank, and says what a plan costs.\n\n");
    for (int i = 0; i < N_COMMANDS; i++)
        fprintf(f, "  %-10s %s\n", commands[i].name, commands[i].summary);
}

int main(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "";
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0) {
        print_help(stdout);
        return 0;
    }
    if (strcmp(name, "--version") == 0) {
        printf("convoke-plan %s\n", CONVOKE_VERSION);
        return 0;
    }
    for (int i = 0; i < N_COMMANDS; i++) {
        if (strcmp(name, commands[i].name) != 0)
            continue;
        status st = commands[i].run(argc - 1, argv + 1);
        if (st != STATUS_OK)
            fprintf(stderr, "convoke-plan: %s\n", status_message());
        return status_exit_code(st);
    }
    if (*name)
        fprintf(stderr, "convoke-plan: unknown command \"%s\"\n", name);
    print_help(stderr);
    return 2;
}
