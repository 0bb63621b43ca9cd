package proxy

import "syscall"

// processAttributes make a child that leads a process group of its own, so
// that a Ctrl-C at the terminal reaches only us, and that does not outlive us.
func processAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
