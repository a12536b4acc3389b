/* door_fake - the gRPC door over the scripted model of fake_coordinator.h, for tests/test_door.py: prints "port N" and takes a
 * command a line from stdin: "state NAME", "wish" (prints the last one), "ready?", "quit [SECONDS]" (drains). The end of stdin is
 * a quit. */
#include "cluster/door_grpc.h"
#include "tests/fake_coordinator.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

/* NAME=VALUE among the arguments. */
static const char *argument(int argc, char **argv, const char *name, const char *fallback)
{
    size_t n = strlen(name);
    for (int i = 1; i < argc; i++)
        if (strncmp(argv[i], name, n) == 0 && argv[i][n] == '=')
            return argv[i] + n + 1;
    return fallback;
}

static void set_state(coordinator *c, const char *name)
{
    static const char *const names[] = {"starting", "ready", "restarting", "draining", "given-up", "stopped"};
    for (int i = 0; i < 6; i++)
        if (strcmp(name, names[i]) == 0)
            fake_set_state(c, (serving_state)i);
}

int main(int argc, char **argv)
{
    char line[200];
    double drain = 0;
    struct rusage used;
    const fake_options fake = {.model_dir = argument(argc, argv, "model", "."),
                               .token_ms = atof(argument(argc, argv, "token_ms", "1")),
                               .tokens_per_step = atoi(argument(argc, argv, "tokens_per_step", "1")),
                               .max_requests = atoi(argument(argc, argv, "max_requests", "64")),
                               .max_length = atoi(argument(argc, argv, "max_length", "2000000")),
                               .admin_token = argument(argc, argv, "admin_token", NULL)};
    const door_grpc_options options = {.address = argument(argc, argv, "address", "127.0.0.1:0"),
                                       .max_message = (size_t)atoi(argument(argc, argv, "max_message", "1048576")),
                                       .max_streams = atoi(argument(argc, argv, "max_streams", "1000")),
                                       .reader_seconds = atof(argument(argc, argv, "reader_seconds", "60")),
                                       .reader_bytes = (size_t)atoi(argument(argc, argv, "reader_bytes", "65536")),
                                       .tls_cert = argument(argc, argv, "tls_cert", NULL),
                                       .tls_key = argument(argc, argv, "tls_key", NULL),
                                       .tls_client_ca = argument(argc, argv, "tls_client_ca", NULL)};
    coordinator *c = fake_create(&fake);
    door_grpc *door = NULL;
    if (door_grpc_start(c, &options, &door) != STATUS_OK) {
        fprintf(stderr, "%s\n", status_message());
        fake_destroy(c);
        return 1;
    }
    printf("port %d\n", door_grpc_port(door));
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        if (strncmp(line, "state ", 6) == 0) {
            set_state(c, line + 6);
            printf("ok\n");
        } else if (strcmp(line, "wish") == 0) {
            printf("%s\n", fake_last_wish(c));
        } else if (strcmp(line, "shutdown?") == 0) {
            printf("%d\n", fake_shutdown_asked(c));
        } else if (strcmp(line, "cpu") == 0) {
            getrusage(RUSAGE_SELF, &used);
            printf("%.6f %ld\n",
                   (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                       (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6,
                   used.ru_maxrss);
        } else if (strncmp(line, "quit", 4) == 0) {
            drain = atof(line + 4);
            break;
        }
        fflush(stdout);
    }
    door_grpc_stop(door, drain);
    fake_destroy(c);
    return 0;
}
