/* convoke_main.c - the program `convoke`: its first word says what to do. */
#include "cluster/generate.h"
#include "cluster/serve.h"
#include "cluster/tokenize.h"
#include "proto/log.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

typedef struct {
    const char *name, *full_name, *help;
    int (*run)(int argc, char **argv);
} command;

static const command commands[] = {
    {"serve", "convoke serve", "answer clients with a model: starts the workers, gRPC and HTTP", serve_command},
    {"generate", "convoke generate", "a prompt in, text out, as a client of a running server or with one of its own",
     generate_command},
    {"tokenize", "convoke tokenize", "text or JSON lines in, token ids out", tokenize_command},
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static void print_help(FILE *file)
{
    fprintf(file, "convoke - serves Mixture-of-Experts models over many workers\n\nusage: convoke COMMAND [OPTIONS]\n\n");
    for (int i = 0; i < N_COMMANDS; i++)
        fprintf(file, "  %-10s %s\n", commands[i].name, commands[i].help);
    fprintf(file, "\nconvoke COMMAND --help says more.\n");
}

int main(int argc, char **argv)
{
    const char *word = argc > 1 ? argv[1] : "--help";
    log_set_speaker("convoke");
    for (int i = 0; i < N_COMMANDS; i++)
        if (strcmp(word, commands[i].name) == 0) {
            argv[1] = (char *)commands[i].full_name;
            return commands[i].run(argc - 1, argv + 1);
        }
    if (strcmp(word, "--version") == 0) {
        printf("convoke %s\n", CONVOKE_VERSION);
        return 0;
    }
    bool asked = strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0;
    print_help(asked && argc > 1 ? stdout : stderr);
    if (!asked)
        log_line("there is no command \"%s\"", word);
    return asked && argc > 1 ? 0 : 2;
}
