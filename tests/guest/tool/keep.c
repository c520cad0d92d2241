/* Keeps a program running, as a service manager would: starts it again whenever it has died, until SIGTERM.
 *
 * SIGTERM goes on to the program, whose end is waited for. It is locked in memory; what it starts is not. */
#include "tool.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t ended;
static volatile pid_t child;

static void end(int number)
{
    ended = 1;
    if (child > 0)
        kill(child, number);
}

int keep_main(int argc, char **argv)
{
    int option;
    while ((option = getopt(argc, argv, "+g:")) != -1)
        switch (option) {
        case 'g':
            enter_group(optarg);
            break;
        default:
            argc = 0;
        }
    if (optind >= argc) {
        fprintf(stderr, "usage: guest-tool keep [-g CGROUP] COMMAND [ARGUMENT...]\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    become_unswappable();
    struct sigaction action = {.sa_handler = end}; /* no SA_RESTART: waitpid must come back */
    sigaction(SIGTERM, &action, NULL);
    for (unsigned starts = 1; !ended; starts++) {
        double began = seconds_now();
        pid_t pid = fork();
        if (pid == 0) {
            signal(SIGTERM, SIG_DFL);
            execvp(argv[optind], argv + optind);
            die(argv[optind]);
        }
        child = pid;
        int status = 0;
        while (pid > 0 && waitpid(pid, &status, 0) < 0 && errno == EINTR) {
        }
        child = 0;
        printf("start %u ended with status %#x after %.1f s\n", starts, (unsigned)status, seconds_now() - began);
        if (!ended && seconds_now() - began < 1)
            nanosleep(&(struct timespec){.tv_nsec = 200000000}, NULL);
    }
    return 0;
}
